-- Whoever sent an `acquire` does not learn the reply, and will run nothing: hand the flight on if that call began it, and
-- let it begin none if it is still on its way.
--
-- ARGV  1 nonce   of that call
--       2 park    how long that is remembered, ms
--
-- Returns nothing.
local nonce = ARGV[1]

remember(nonce, '', ARGV[2])
local flight = redis.call('HMGET', FLIGHT, 'fence', 'state', 'claim', 'attempt')
local fence, state = flight[1], flight[2]
if not fence or not (state == 'P' and fence == string.match(fence, '^%d+%-') .. nonce or state == 'R' and flight[3] == nonce) then
  return
end
set_state('Q')
redis.call('HDEL', FLIGHT, 'claim', 'holder')
set_lease(FLIGHT, 0)
redis.call('ZREM', RUNS, fence .. ' ' .. flight[4])
ring(FLIGHT, fence, nil)
