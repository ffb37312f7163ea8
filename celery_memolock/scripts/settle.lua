-- A run ends with a value or an error. Only the current (fence, attempt) stores; a detached one is parked for
-- those who waited for it. Attempt 0 is a flight that no worker has claimed: its dispatcher may fail it.
--
-- ARGV  1 fence, 2 attempt   of the run
--       3 kind               "V" or "E"
--       4 form, 5 body       the outcome
--       6 ttl                how long the value (or the error) is kept, ms; 0: not at all
--       7 park               how long an outcome is parked, ms
--       8 fleeting           "1" if the ttl is too short to count on
--
-- Returns "OK"; "AGAIN", stored and a refresh was asked for meanwhile; "DETACHED", parked only; or "REFUSED".
-- A repeat gets the same, but "OK" for "DETACHED".
local fence, attempt, kind = ARGV[1], ARGV[2], ARGV[3]
local ttl_ms, park_ms = tonumber(ARGV[6]), tonumber(ARGV[7])

local home, answer = FLIGHT, 'OK'
local flight = redis.call('HMGET', FLIGHT, 'fence', 'attempt', 'started', 'again')
if flight[1] ~= fence or flight[2] ~= attempt then
  home, answer = of_fence('d', fence), 'DETACHED'
  flight = redis.call('HMGET', home, 'fence', 'attempt', 'started')
  if flight[1] ~= fence or flight[2] ~= attempt then
    if remembered(fence .. '-' .. attempt) then
      return 'AGAIN'
    end
    if entry_fence() == fence or redis.call('EXISTS', of_fence('p', fence)) == 1 then
      return 'OK'
    end
    return 'REFUSED'
  end
elseif flight[4] then
  answer = 'AGAIN'
  remember(fence .. '-' .. attempt, '1', park_ms)
end

local store_as = nil
if home == FLIGHT then
  store_as = kind == 'V' and ENTRY or ERROR
end
local outcome = pack(kind, fence, tonumber(flight[3]) or now, ttl_ms, ARGV[4], ARGV[5])
conclude(home, fence, outcome, store_as, ttl_ms, park_ms, ARGV[8] == '1')
redis.call('ZREM', RUNS, fence .. ' ' .. attempt)
return answer
