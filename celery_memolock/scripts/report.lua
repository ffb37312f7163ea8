-- A run tells those who wait how far it is. Never creates a key.
--
-- ARGV  1 fence, 2 attempt   of the run
--       3 report             its number in the flight, and what they are told
--
-- Returns 1, or 0 when the flight is another's by now.
local fence, attempt = ARGV[1], ARGV[2]
for _, home in ipairs({FLIGHT, of_fence('d', fence)}) do
  local flight = redis.call('HMGET', home, 'fence', 'attempt', 'state')
  if flight[1] == fence and flight[2] == attempt and flight[3] == 'R' then
    redis.call('HSET', home, 'progress', ARGV[3])
    ring(home, fence, 'P' .. ARGV[3])
    return 1
  end
end
return 0
