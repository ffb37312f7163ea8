-- Answer a caller, let it join the live flight, or make it the winner that has to dispatch a new one.
--
-- ARGV  1 nonce       of this call; becomes the token of a new flight, so that a repeat finds itself the winner
--       2 mode        "miss": any fresh value will do; "force": one whose computing starts after this call
--       3 seen        fence of a value that is not good enough for the caller, or ""
--       4 following   fence of the flight whose outcome the caller waits for, or ""
--       5 inbox       channel of the caller's process, or "" when it will not wait
--       6 sequence    of this registration
--       7 wanted      how long the caller is ready to wait, ms
--       8 dispatch    lease of a new flight, ms
--       9 crashes     at most so many before the flight fails
--      10 park        how long an outcome is parked, ms
--      11 form, 12 body of the error for too many crashes
--      13 since       "force" again, for the same call: when its first look was; else ""
--      14 holder      who would run a new flight at once, in the caller's process; "" if a message is to be sent
--      15 lease       of that run, ms
--      16 overlap     at most so many runs of the key are alive at once
--      17 error       how long new callers get the error for too many crashes, ms
--
-- Returns {"DONE", outcome}
--         {"WAIT", fence, lease left ms, state, ms in that state, server time, progress}
--         {"WIN", fence, lease ms, server time}
--         {"RUN", fence, lease ms, server time}: won, and its first attempt is claimed
local nonce, mode, seen, following, inbox, sequence = unpack(ARGV, 1, 6)
local wanted_ms, dispatch_ms = tonumber(ARGV[7]), tonumber(ARGV[8])
local max_crashes, park_ms = tonumber(ARGV[9]), tonumber(ARGV[10])
local since = tonumber(ARGV[13]) or math.huge

local function wait(flight, fence, left)
  register(flight, inbox, sequence, wanted_ms)
  local at = redis.call('HMGET', flight, 'state', 'since', 'progress')
  return {'WAIT', fence, left, at[1], math.floor((now - tonumber(at[2])) / 1000), int(now), at[3] or ''}
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

local stored, started, fresh_until = stored_value()
local good
if mode == 'miss' then
  good = stored and stored ~= seen and now < fresh_until
else
  good = stored and started >= since
end
if good then
  return {'DONE', redis.call('GET', ENTRY)}
end
if mode == 'miss' then
  local failure = redis.call('GET', ERROR)
  if failure then
    return {'DONE', failure}
  end
end

local flight = redis.call('HMGET', FLIGHT, 'fence', 'state', 'takeovers', 'attempt', 'started', 'claim')
local fence, state = flight[1], flight[2]
if fence then
  local left = lease_left(FLIGHT)
  if state == 'P' and fence == string.match(fence, '^%d+%-') .. nonce then
    register(FLIGHT, inbox, sequence, wanted_ms)
    return {'WIN', fence, left, int(now)}
  end
  if state == 'R' and flight[6] == nonce then
    register(FLIGHT, inbox, sequence, wanted_ms)
    return {'RUN', fence, left, int(now)}
  end
  if left > 0 then
    -- It runs, or ran and may still do so beside its own retry.
    local began = flight[4] ~= '0' and (state ~= 'R' or tonumber(flight[5]) < since)
    if mode == 'force' and began then
      redis.call('HSET', FLIGHT, 'again', 1)
    end
    return wait(FLIGHT, fence, left)
  end
end
local said = remembered(nonce)  -- to this very call, or that its caller withdrew it
if said then
  return {'DONE', said}
end
if fence then
  local takeovers = 0
  if state == 'R' then
    local failure = crashed(max_crashes, ARGV[11], ARGV[12], tonumber(ARGV[17]), park_ms)
    if failure then
      remember(nonce, failure, park_ms)
      return {'DONE', failure}
    end
  else
    takeovers = tonumber(flight[3]) + 1
  end
  -- Those who waited for the old flight keep their places, and look again to learn whom they follow now.
  ring(FLIGHT, fence, nil)
  redis.call('HDEL', FLIGHT, 'claim', 'holder', 'started', 'progress')
  redis.call('HSET', FLIGHT, 'takeovers', takeovers)
else
  redis.call('HSET', FLIGHT, 'takeovers', 0, 'crashes', 0)
end

fence = new_fence(nonce, fence, stored)
redis.call('HSET', FLIGHT, 'fence', fence, 'attempt', 0, 'retries', 0)
redis.call('DEL', ERROR)
set_state('P')
local lease_ms = stretched(dispatch_ms)
set_lease(FLIGHT, lease_ms)
register(FLIGHT, inbox, sequence, wanted_ms)
if ARGV[14] ~= '' and not too_many_runs(tonumber(ARGV[16])) then
  begin_run(fence, 1, nonce, ARGV[14], 0, tonumber(ARGV[15]))
  return {'RUN', fence, tonumber(ARGV[15]), int(now)}
end
return {'WIN', fence, lease_ms, int(now)}
