-- Drop the value. It is never served again, and neither is one whose computing began before now: a flight that
-- runs moves aside under its own fence, to end for those alone who wait for it already. A flight that does not
-- run yet stays: its computing will start later.
--
-- ARGV  1 nonce   of this call
--       2 park    how long its answer is kept for a repeat, ms
--
-- Returns 1 if there was a value, else 0. A repeat gets the same.
local removed = redis.call('DEL', ENTRY)
if removed == 1 then
  remember(ARGV[1], '1', tonumber(ARGV[2]))
elseif remembered(ARGV[1]) then
  removed = 1
end
redis.call('DEL', ERROR)
local flight = redis.call('HMGET', FLIGHT, 'fence', 'state', 'attempt')
if flight[2] == 'R' then
  redis.call('RENAME', FLIGHT, of_fence('d', flight[1]))
elseif flight[2] == 'Q' and flight[3] ~= '0' then
  -- Between two attempts the earlier run may still be alive: its outcome must not count any more.
  redis.call('HINCRBY', FLIGHT, 'attempt', 1)
end
return removed
