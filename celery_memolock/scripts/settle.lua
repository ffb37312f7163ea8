-- A run ends with a value or an error. Only the current (fence, attempt) stores; a detached one is parked for
-- those who waited for it. Attempt 0 is a flight that no worker has claimed: its dispatcher may fail it.
--
-- ARGV  1 fence, 2 attempt   of the run
--       3 kind               "V" or "E"
--       4 form, 5 body       the outcome
--       6 ttl                how long the value is fresh, ms
--       7 keep               how long the value (or the error) is kept, ms; 0: not at all. A value that is not kept
--                            takes an older one away: what it replaces counts no more
--       8 park               how long an outcome is parked, ms
--       9 fleeting           "1" if the ttl is too short to count on
--
-- Returns "OK"; "AGAIN", stored and a refresh was asked for meanwhile; "DETACHED", parked only; or "REFUSED".
-- A repeat gets the same, but "OK" for "DETACHED".
-- On "AGAIN" a worker starts the next run; so it does for a detached one, if no run began after it. Who settles from
-- outside cannot, so that then the value is stored as a stale one, as far as such are kept, and the next call has it
-- refreshed.
local fence, attempt, kind = ARGV[1], ARGV[2], ARGV[3]
local ttl_ms, keep_ms, park_ms = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])

local home, answer = FLIGHT, 'OK'
local flight = redis.call('HMGET', FLIGHT, 'fence', 'attempt', 'started', 'again', 'external')
if flight[1] ~= fence or flight[2] ~= attempt then
  home, answer = of_fence('d', fence), 'DETACHED'
  flight = redis.call('HMGET', home, 'fence', 'attempt', 'started', 'again', 'external')
  if flight[1] ~= fence or flight[2] ~= attempt then
    if remembered(fence .. '-' .. attempt) then
      return 'AGAIN'
    end
    if stored_value() == fence or redis.call('EXISTS', of_fence('p', fence)) == 1 then
      return 'OK'
    end
    return 'REFUSED'
  end
end
local outside = flight[5]
if flight[4] and (home == FLIGHT or (not outside and redis.call('EXISTS', ENTRY, FLIGHT) == 0)) then
  answer = 'AGAIN'
  remember(fence .. '-' .. attempt, '1', park_ms)
  if outside then
    ttl_ms, keep_ms = 0, math.max(0, keep_ms - ttl_ms)
  end
end

local store_as = nil
if home == FLIGHT then
  store_as = kind == 'V' and ENTRY or ERROR
end
if store_as == ENTRY and keep_ms == 0 then
  redis.call('DEL', ENTRY)
end
local outcome = pack(kind, fence, tonumber(flight[3]) or now, ttl_ms, keep_ms, ARGV[4], ARGV[5])
conclude(home, fence, outcome, store_as, keep_ms, park_ms, ARGV[9] == '1')
redis.call('ZREM', RUNS, fence .. ' ' .. attempt)
return answer
