-- Nobody in a process waits any more: remove its registration, unless a newer one took its place.
--
-- ARGV  1 fence                of the flight it waited for; "" if it never learned that
--       2 inbox, 3 sequence   of the registration
--
-- Returns {state, ms in that state} of that flight, for the message of a time-out; {} when it is over.
local field = 'w:' .. ARGV[2]
local at = {}
for _, flight in ipairs({FLIGHT, of_fence('d', ARGV[1])}) do
  if redis.call('HGET', flight, field) == ARGV[3] then
    redis.call('HDEL', flight, field)
  end
  local found = redis.call('HMGET', flight, 'fence', 'state', 'since')
  if found[1] and (ARGV[1] == '' or ARGV[1] == found[1]) then
    at = {found[2], math.floor((now - tonumber(found[3])) / 1000)}
  end
end
return at
