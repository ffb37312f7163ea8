-- Let a value be stale from now on: it is served only as far as stale ones are, and the next caller has it refreshed.
-- After a run that goes on meanwhile, or may do so beside its own retry, comes another.
--
-- ARGV  1 keep    how long the value may be kept as a stale one, ms
--
-- Returns 1 if there was a value, else 0. A repeat gets the same.
local keep_ms = tonumber(ARGV[1])
if (redis.call('HGET', FLIGHT, 'attempt') or '0') ~= '0' then
  redis.call('HSET', FLIGHT, 'again', 1)
end
local head = redis.call('GETRANGE', ENTRY, 0, 127)
local fence, started, fresh_until = string.match(head, '^ML1 [VS] (%d+%-%w+) (%d+) (%d+) ')
if not fence then
  return 0
end
if tonumber(fresh_until) > now then
  -- The instants of both have as many digits.
  redis.call('SETRANGE', ENTRY, 4, 'S ' .. fence .. ' ' .. started .. ' ' .. int(now))
  if redis.call('PTTL', ENTRY) > keep_ms then
    redis.call('PEXPIRE', ENTRY, keep_ms)
  end
end
return 1
