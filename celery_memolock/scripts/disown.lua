-- The worker's main process knows that a run is over, or that a message will never run: its child was killed, the hard
-- time limit struck, the message was revoked. It says so at once instead of leaving it to the lease.
--
-- ARGV  1 fence              in the message
--       2 holder             of the run, or "" if the message never began to run. A late word about a run that is gone
--                            already must not end the next one, which has another holder.
--       3 form, 4 body       of the error for all who wait, or "" to let one of them take over
--       5 park               how long an outcome is parked, ms
--       6 error              how long new callers get the error, ms
--
-- Returns 1 if it concerned a flight, else 0.
local message_fence, holder = ARGV[1], ARGV[2]

for _, home in ipairs({FLIGHT, of_fence('d', message_fence)}) do
  local flight = redis.call('HMGET', home, 'fence', 'state', 'holder', 'attempt')
  local fence, state = flight[1], flight[2]
  local waits = holder == '' and fence == message_fence and state ~= 'R'
  local runs = holder ~= '' and state == 'R' and flight[3] == holder
  if waits or runs then
    redis.call('ZREM', RUNS, fence .. ' ' .. flight[4])
    if ARGV[3] ~= '' then
      fail(home, ARGV[3], ARGV[4], tonumber(ARGV[6]), tonumber(ARGV[5]))
    else
      redis.call('HSET', home, 'lease_until', int(now))
      ring(home, fence, nil)
    end
    return 1
  end
end
return 0
