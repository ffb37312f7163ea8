-- Name an entry in the indices of its tags, and forget those whose time is over.
--
-- KEYS        indices, sorted sets: entry by the instant until which it may have a value
-- ARGV  1 entry
--       2 life    for how long from now, ms
local life_ms = tonumber(ARGV[2])
for _, index in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', index, '-inf', int(now))
  redis.call('ZADD', index, 'GT', int(now + life_ms * 1000), ARGV[1])
  if redis.call('PTTL', index) < life_ms then
    redis.call('PEXPIRE', index, life_ms)
  end
end
return 1
