-- A run is about to send its message again (a retry): the flight goes back to QUEUED, its waiters keep waiting.
-- Called before the message is published, or a fast worker would find the flight still running.
--
-- ARGV  1 fence, 2 attempt   of the run
--       3 retries            that the new message carries
--       4 lease              countdown and queueing, ms; 0: nobody will send it, so those who wait may take over now
--
-- Returns "OK", "DETACHED" (an invalidation made this flight worthless: its waiters were told to look again, and
-- it must not be retried) or "LOST" (another flight took over).
local fence, attempt = ARGV[1], ARGV[2]

local flight = redis.call('HMGET', FLIGHT, 'fence', 'attempt')
if flight[1] == fence and flight[2] == attempt then
  set_state('Q')
  redis.call('HSET', FLIGHT, 'retries', ARGV[3])
  redis.call('HDEL', FLIGHT, 'claim', 'holder')
  set_lease(FLIGHT, tonumber(ARGV[4]))
  redis.call('ZREM', RUNS, fence .. ' ' .. attempt)
  if ARGV[4] == '0' then
    ring(FLIGHT, fence, nil)
  end
  return 'OK'
end
local aside = of_fence('d', fence)
if redis.call('HGET', aside, 'attempt') == attempt then
  ring(aside, fence, nil)
  redis.call('DEL', aside)
  redis.call('ZREM', RUNS, fence .. ' ' .. attempt)
  return 'DETACHED'
end
return 'LOST'
