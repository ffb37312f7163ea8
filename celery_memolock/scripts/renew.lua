-- A run gives a sign of life. Never creates a key.
--
-- ARGV  1 fence, 2 attempt   of the run
--       3 lease              ms
--       4 external           "1" if it is handed out now, and another process settles it
--
-- Returns "CONTINUE", "DETACHED" (an invalidation moved it aside: only those who wait for it get its outcome)
-- or "LOST" (its outcome will be refused).
local fence, attempt, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local function mine(flight)
  local at = redis.call('HMGET', flight, 'fence', 'attempt', 'state')
  return at[1] == fence and at[2] == attempt and at[3] == 'R'
end

local aside = of_fence('d', fence)
local answer
if mine(FLIGHT) then
  set_lease(FLIGHT, lease_ms)
  answer = 'CONTINUE'
elseif mine(aside) then
  set_lease(aside, lease_ms)
  answer = 'DETACHED'
else
  return 'LOST'
end
if ARGV[4] == '1' then
  redis.call('HSET', answer == 'CONTINUE' and FLIGHT or aside, 'external', 1)
end
run_alive(fence, attempt, lease_ms)
return answer
