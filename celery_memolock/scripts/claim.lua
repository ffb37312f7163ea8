-- A worker holds a flight's message and asks whether to run it.
--
-- ARGV  1 fence        in the message
--       2 nonce        of this claim; a repeat gets the same answer
--       3 holder       who asks: host, process, child
--       4 lease        ms
--       5 retries      of the message
--       6 redelivered  "1" if the broker says so
--       7 overlap      at most so many runs of the key are alive at once
--       8 abandon      "1" if a flight that nobody waits for any more need not run
--       9 crashes      at most so many before the flight fails
--      10 park         how long an outcome is parked, ms
--      11 form, 12 body of the error for too many crashes
--      13 error        how long new callers get it, ms
--
-- Returns {"RUN", fence, attempt}
--         {"DEFER", ms}      ask again after that
--         {"SKIP", reason}   the message is not needed
local message_fence, nonce, holder = ARGV[1], ARGV[2], ARGV[3]
local lease_ms, retries, redelivered = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6] == '1'

local flight = redis.call('HMGET', FLIGHT, 'fence', 'state', 'attempt', 'retries', 'claim')
local fence, state, attempt = flight[1], flight[2], tonumber(flight[3])
if not fence then
  return {'SKIP', 'the flight is over'}
end
if state == 'R' and flight[5] == nonce then
  return {'RUN', fence, attempt}
end

local counted = tonumber(flight[4])
if retries < counted then
  return {'SKIP', 'an old copy from before a retry'}
end
if fence ~= message_fence then
  -- An older message may do the work of the current flight, or take-overs under a backlog would move it to the
  -- tail of the queue for ever.
  if state == 'R' or fence_time(message_fence) > fence_time(fence) then
    return {'SKIP', 'another flight took over'}
  end
elseif state == 'R' then
  local left = lease_left(FLIGHT)
  if left > 0 then
    -- More retries than recorded: the earlier run could not announce its retry, and may still be alive.
    if redelivered or retries > counted then
      return {'DEFER', left}
    end
    return {'SKIP', 'a duplicate: it runs already'}
  end
  local error_ms, park_ms = tonumber(ARGV[13]), tonumber(ARGV[10])
  if retries == counted and crashed(tonumber(ARGV[9]), ARGV[11], ARGV[12], error_ms, park_ms) then
    return {'SKIP', 'it killed too many workers'}
  end
end

if ARGV[8] == '1' then
  local wanted = redis.call('HMGET', FLIGHT, 'wanted_until', 'background')
  if not wanted[2] and (tonumber(wanted[1]) or 0) < now and not has_waiters(FLIGHT) then
    redis.call('DEL', FLIGHT)
    return {'SKIP', 'nobody waits for it any more'}
  end
end

local first_end = too_many_runs(tonumber(ARGV[7]))
if first_end then
  local defer_ms = math.max(1, math.ceil((first_end - now) / 1000))
  set_state('Q')
  set_lease(FLIGHT, math.max(lease_left(FLIGHT), defer_ms + lease_ms))
  return {'DEFER', defer_ms}
end

begin_run(fence, attempt + 1, nonce, holder, retries, lease_ms)
return {'RUN', fence, attempt + 1}
