-- A value is set from outside: it is stored under a new fence, and ends the current flight, whose waiters get it
-- and whose own late outcome will be refused.
--
-- ARGV  1 nonce          of this call, the token of its fence
--       2 form, 3 body   the value
--       4 ttl            ms
--       5 park           how long an outcome is parked, ms
--       6 fleeting       "1" if the ttl is too short to count on
--
-- Returns the fence. A repeat gets the same.
local stored = entry_fence()
if stored and string.match(stored, '%-(%w+)$') == ARGV[1] then
  return stored
end
local flying = redis.call('HGET', FLIGHT, 'fence')
local fence = new_fence(ARGV[1], stored, flying)
local ttl_ms = tonumber(ARGV[4])
local outcome = pack('V', fence, now, ttl_ms, ARGV[2], ARGV[3])
if flying then
  if not conclude(FLIGHT, flying, outcome, ENTRY, ttl_ms, tonumber(ARGV[5]), ARGV[6] == '1') then
    return redis.error_reply('OOM the value could not be stored')
  end
else
  redis.call('SET', ENTRY, outcome, 'PX', ttl_ms)
end
redis.call('DEL', ERROR)
return fence
