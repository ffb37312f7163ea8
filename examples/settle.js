// Settles a flight that a task handed out: plain Redis commands over a socket, without any package.
//
//   node examples/settle.js redis://:password@localhost:6379/0 "$TOKEN" '{"waiting": 7}'
//
// The token is the task's current_flight.token; its format is described in celery_memolock/external.py.

const net = require("node:net");

const [url, token, value] = process.argv.slice(2);
const server = new URL(url);
const [user, password] = [server.username, server.password].map(decodeURIComponent);
const database = server.pathname.slice(1);
const flight = JSON.parse(token);
if (flight.format !== 1) throw new Error("a token of another version");
JSON.parse(value); // an error here is better than one for all who wait
if (Buffer.byteLength(value) > flight.max_size) throw new Error("the value is too large");

const commands = [[
  "EVAL", flight.script, 4, ...flight.keys,
  flight.fence, flight.attempt, "V", "application/json utf-8 - =", value,
  flight.ttl, flight.keep, flight.park, 1,
]];
if (database) commands.unshift(["SELECT", database]);
if (password) commands.unshift(["AUTH", user || "default", password]);

const bulk = (part) => `$${Buffer.byteLength(String(part))}\r\n${part}\r\n`;
const packed = commands.map((parts) => `*${parts.length}\r\n${parts.map(bulk).join("")}`).join("");
const link = net.connect(Number(server.port || 6379), server.hostname, () => link.write(packed));
let answer = "";
link.on("data", (data) => {
  answer += data;
  // a reply is a line, "+OK" or "-ERR ...", or a line after that with its length: "$2", "OK"
  const replies = answer.split("\r\n").slice(0, -1).filter((line) => !line.startsWith("$"));
  const said = replies.find((line) => line.startsWith("-")) ?? replies[commands.length - 1];
  if (said === undefined) return;
  link.end();
  console.log(said);
  process.exitCode = /^(OK|AGAIN|DETACHED)$/.test(said) ? 0 : 1;
});
link.on("error", (error) => { console.error(error.message); process.exitCode = 1; });
