-- A value is set from outside: it is stored under a new fence, and ends the current flight, whose waiters get it
-- and whose own late outcome will be refused. One that is not kept takes an older one away: what it replaces counts no
-- more.
--
-- ARGV  1 nonce          of this call, the token of its fence
--       2 form, 3 body   the value
--       4 ttl            how long it is fresh, ms
--       5 keep           how long it is kept, ms; 0: not at all
--       6 park           how long an outcome is parked, ms
--       7 fleeting       "1" if the ttl is too short to count on
--
-- Returns the fence. A repeat gets the same.
local stored = stored_value()
if stored and string.match(stored, '%-(%w+)$') == ARGV[1] then
  return stored
end
local before = remembered(ARGV[1])
if before then
  return before
end
local flying = redis.call('HGET', FLIGHT, 'fence')
local fence = new_fence(ARGV[1], stored, flying)
local ttl_ms, keep_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
local outcome = pack('V', fence, now, ttl_ms, keep_ms, ARGV[2], ARGV[3])
if keep_ms == 0 then
  redis.call('DEL', ENTRY)
  remember(ARGV[1], fence, tonumber(ARGV[6]))
end
if flying then
  local done = conclude(FLIGHT, flying, outcome, ENTRY, keep_ms, tonumber(ARGV[6]), ARGV[7] == '1')
  if not done and keep_ms > 0 then
    return redis.error_reply('OOM the value could not be stored')
  end
elseif keep_ms > 0 then
  redis.call('SET', ENTRY, outcome, 'PX', keep_ms)
end
redis.call('DEL', ERROR)
return fence
