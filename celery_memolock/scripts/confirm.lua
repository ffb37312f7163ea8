-- The message is with the broker: PENDING becomes QUEUED. A worker may have been faster, or an outcome may be
-- there already; then nothing is left to do.
--
-- ARGV  1 fence   of the flight that was dispatched
--       2 lease   how long the message may wait for a worker, ms
--
-- Returns 1 if the flight is queued now, else 0.
local flight = redis.call('HMGET', FLIGHT, 'fence', 'state')
if flight[1] ~= ARGV[1] or flight[2] == 'R' then
  return 0
end
if flight[2] == 'Q' then
  return 1
end
set_state('Q')
set_lease(FLIGHT, stretched(tonumber(ARGV[2])))
return 1
