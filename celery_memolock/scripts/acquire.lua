-- Answer a caller, let it join the live flight, or make it the winner that has to dispatch a new one.
--
-- ARGV  1 nonce       of this call; becomes the token of a new flight, so that a repeat finds itself the winner
--       2 mode        "miss": any value will do; "force": a value whose computing starts after this call
--       3 seen        fence of a value that the caller could not use, or ""
--       4 following   fence of the flight whose outcome the caller waits for, or ""
--       5 inbox       channel of the caller's process, or "" when it will not wait
--       6 sequence    of this registration
--       7 wanted      how long the caller is ready to wait, ms
--       8 dispatch    lease of a new flight, ms
--       9 crashes     at most so many before the flight fails
--      10 park        how long an outcome is parked, ms
--      11 form, 12 body of the error for too many crashes
--
-- Returns {"DONE", outcome}
--         {"WAIT", fence, lease left ms, state, ms in that state}
--         {"WIN", fence, lease ms}
local nonce, mode, seen, following, inbox, sequence = unpack(ARGV, 1, 6)
local wanted_ms, dispatch_ms = tonumber(ARGV[7]), tonumber(ARGV[8])
local max_crashes, park_ms = tonumber(ARGV[9]), tonumber(ARGV[10])

local function wait(flight, fence, left)
  register(flight, inbox, sequence, wanted_ms)
  local at = redis.call('HMGET', flight, 'state', 'since')
  return {'WAIT', fence, left, at[1], math.floor((now - tonumber(at[2])) / 1000)}
end

if following ~= '' then
  local parked = redis.call('GET', of_fence('p', following))
  if parked then
    return {'DONE', parked}
  end
  local aside = of_fence('d', following)
  local left = lease_left(aside)
  if left and left > 0 then
    return wait(aside, following, left)
  end
end

local stored = entry_fence()
if mode == 'miss' then
  if stored and stored ~= seen then
    return {'DONE', redis.call('GET', ENTRY)}
  end
  local failure = redis.call('GET', ERROR)
  if failure then
    return {'DONE', failure}
  end
end

local flight = redis.call('HMGET', FLIGHT, 'fence', 'state', 'takeovers', 'attempt')
local fence, state = flight[1], flight[2]
if fence then
  local left = lease_left(FLIGHT)
  if state == 'P' and fence == string.match(fence, '^%d+%-') .. nonce then
    register(FLIGHT, inbox, sequence, wanted_ms)
    return {'WIN', fence, left}
  end
  if left > 0 then
    if mode == 'force' and flight[4] ~= '0' then  -- it runs, or ran and may still do so beside its own retry
      redis.call('HSET', FLIGHT, 'again', 1)
    end
    return wait(FLIGHT, fence, left)
  end
  local takeovers = 0
  if state == 'R' then
    local failure = crashed(max_crashes, ARGV[11], ARGV[12], park_ms)
    if failure then
      remember(nonce, failure, park_ms)
      return {'DONE', failure}
    end
  else
    takeovers = tonumber(flight[3]) + 1
  end
  -- Those who waited for the old flight keep their places, and look again to learn whom they follow now.
  ring(FLIGHT, fence, nil)
  redis.call('HDEL', FLIGHT, 'claim', 'holder', 'started')
  redis.call('HSET', FLIGHT, 'takeovers', takeovers)
else
  local failure = remembered(nonce)
  if failure then
    return {'DONE', failure}
  end
  redis.call('HSET', FLIGHT, 'takeovers', 0, 'crashes', 0)
end

fence = new_fence(nonce, fence, stored)
redis.call('HSET', FLIGHT, 'fence', fence, 'attempt', 0, 'retries', 0)
redis.call('DEL', ERROR)
set_state('P')
local lease_ms = stretched(dispatch_ms)
set_lease(FLIGHT, lease_ms)
register(FLIGHT, inbox, sequence, wanted_ms)
return {'WIN', fence, lease_ms}
