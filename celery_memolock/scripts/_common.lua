-- Prepended to every script.
--
-- KEYS[1] entry     string  header line and payload: see codec.py
-- KEYS[2] flight    hash    the one current flight of the key, absent when nobody computes it
-- KEYS[3] error     string  the error that new callers get during its back-off
-- KEYS[4] runs      zset    "fence attempt" of each run that is alive; score: its lease's end
-- Two more are named in here, in the same slot:
-- d:<fence>         hash    a flight that an invalidation moved aside while it ran
-- p:<fence>         string  a parked outcome, for waiters that could not read it from the entry
-- a:<nonce>         string  an answer that a repeated call must get again, where nothing else tells it
--
-- Fields of a flight: fence, state (P pending, Q queued, R running), since, attempt, retries, crashes,
-- takeovers, started, claim (nonce of the claim), holder, lease_until, lease_ms, wanted_until (the last deadline of its
-- callers), background (wanted without a caller), progress (its run's last report), again (a refresh was asked for while
-- it ran), external (its run was handed out, and another process settles it), and w:<inbox channel> = sequence for every
-- waiting process.
-- Instants are the server's, in microseconds; durations are in milliseconds.

local ENTRY, FLIGHT, ERROR, RUNS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local GRACE = 60000
local INLINE = 4096

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function int(number)
  return string.format('%.0f', number)
end

-- The key of that kind which belongs to one fence, in the slot of the entry.
local function of_fence(kind, fence)
  local head, tail = string.match(ENTRY, '^(.-):e:({.*)$')
  return head .. ':' .. kind .. ':' .. fence .. ':' .. tail
end

local function fence_time(fence)
  return tonumber(string.match(fence or '', '^(%d+)')) or 0
end

-- A fence later than all that are known here. Its order is best effort; safety rests on its equality.
local function new_fence(token, ...)
  local at = now
  for _, fence in ipairs({...}) do
    at = math.max(at, fence_time(fence) + 1)
  end
  return int(at) .. '-' .. token
end

-- Of the stored value: its fence, when its computing began, until when it is fresh. Nil when there is none or it is
-- not of our making.
local function stored_value()
  local head = redis.call('GETRANGE', ENTRY, 0, 127)
  local fence, started, fresh_until = string.match(head, '^ML1 [VS] (%d+%-%w+) (%d+) (%d+) ')
  return fence, tonumber(started), tonumber(fresh_until)
end

-- Milliseconds left of a flight's lease, 0 when it has passed, nil when there is no flight. More than the
-- lease is long means that the clock jumped, and counts as the lease.
local function lease_left(flight)
  local lease = redis.call('HMGET', flight, 'lease_until', 'lease_ms')
  if not lease[1] then
    return nil
  end
  local left = math.ceil((tonumber(lease[1]) - now) / 1000)
  return math.max(0, math.min(left, tonumber(lease[2])))
end

-- The hash outlives its lease by a grace minute, so that a late sign of life can revive it.
local function set_lease(flight, ms)
  redis.call('HSET', flight, 'lease_until', int(now + ms * 1000), 'lease_ms', ms)
  redis.call('PEXPIRE', flight, ms + GRACE)
end

-- Consecutive take-overs of an unclaimed flight double its lease, up to 16 times: under a backlog the queue
-- must not grow by one message a lease.
local function stretched(ms)
  local takeovers = tonumber(redis.call('HGET', FLIGHT, 'takeovers')) or 0
  return ms * math.min(2 ^ takeovers, 16)
end

local function set_state(state)
  redis.call('HSET', FLIGHT, 'state', state, 'since', int(now))
end

local function run_alive(fence, attempt, ms)
  redis.call('ZADD', RUNS, int(now + ms * 1000), fence .. ' ' .. attempt)
  redis.call('PEXPIRE', RUNS, ms + GRACE)
end

-- Begin an attempt of the current flight.
local function begin_run(fence, attempt, claim, holder, retries, lease_ms)
  set_state('R')
  redis.call('HSET', FLIGHT, 'attempt', attempt, 'retries', retries, 'claim', claim, 'holder', holder,
    'started', int(now), 'takeovers', 0)
  -- Whoever asked for newer data gets them from this run.
  redis.call('HDEL', FLIGHT, 'again', 'progress', 'external')
  set_lease(FLIGHT, lease_ms)
  run_alive(fence, attempt, lease_ms)
end

-- The end of the first of the key's live runs, in microseconds, when so many are alive that no more may begin.
local function too_many_runs(overlap)
  redis.call('ZREMRANGEBYSCORE', RUNS, '-inf', int(now))
  if redis.call('ZCARD', RUNS) < overlap then
    return nil
  end
  return tonumber(redis.call('ZRANGE', RUNS, 0, 0, 'WITHSCORES')[2])
end

local function register(flight, inbox, sequence, wanted_ms)
  if inbox == '' then
    redis.call('HSET', flight, 'background', 1)
    return
  end
  local before = tonumber(redis.call('HGET', flight, 'wanted_until')) or 0
  redis.call('HSET', flight, 'w:' .. inbox, sequence, 'wanted_until', int(math.max(before, now + wanted_ms * 1000)))
end

local function has_waiters(flight)
  for _, field in ipairs(redis.call('HKEYS', flight)) do
    if string.sub(field, 1, 2) == 'w:' then
      return true
    end
  end
  return false
end

-- Tell every waiting process of a flight. The fence, of which 64 bits are random, shows that the notice is ours. A
-- small outcome rides along, or "P" and a report of its run; without one, or when it is larger, the notice says: look
-- again.
local function ring(flight, fence, outcome)
  local notice = fence .. '\n'
  if outcome and #outcome <= INLINE then
    notice = notice .. outcome
  end
  for _, field in ipairs(redis.call('HKEYS', flight)) do
    local inbox = string.match(field, '^w:(.+)$')
    if inbox then
      redis.call('PUBLISH', inbox, notice)
    end
  end
end

-- A value that is kept for longer than it is fresh says so: whoever reads it then looks at the time.
local function pack(kind, fence, started, ttl_ms, keep_ms, form, body)
  if kind == 'V' and keep_ms > ttl_ms then
    kind = 'S'
  end
  return 'ML1 ' .. kind .. ' ' .. fence .. ' ' .. int(started) .. ' ' .. int(now + ttl_ms * 1000) .. ' '
    .. int(now - started) .. ' ' .. form .. '\n' .. body
end

-- End a flight with an outcome: store it if it may be stored, park it if its waiters could not read it there (it is
-- not stored as the entry, or so shortly that a waiter whose notice got lost comes too late), tell them, and only then
-- clear the flight. Returns whether it was stored.
-- A full server refuses the first write of a script that may cost memory, but none after a write that was
-- allowed: so PEXPIRE comes first, and each SET may fail without stopping the rest.
local function conclude(flight, fence, outcome, store_as, keep_ms, park_ms, fleeting)
  redis.call('PEXPIRE', flight, GRACE)
  local stored = false
  if store_as and keep_ms > 0 then
    stored = not redis.pcall('SET', store_as, outcome, 'PX', keep_ms).err
  end
  if fleeting or not stored or store_as ~= ENTRY then
    redis.pcall('SET', of_fence('p', fence), outcome, 'PX', park_ms)
  end
  ring(flight, fence, outcome)
  redis.call('DEL', flight)
  return stored
end

-- Keep an answer for a repeat of the call: the first reply may have been lost on its way.
local function remember(nonce, answer, ms)
  redis.pcall('SET', of_fence('a', nonce), answer, 'PX', ms)
end

local function remembered(nonce)
  return redis.call('GET', of_fence('a', nonce))
end

-- End a flight with an error that none of its runs could tell. New callers get it for its time, unless a refresh was
-- asked for meanwhile: no worker is there to start that, so it falls to the next call. Returns the error's record.
local function fail(home, form, body, error_ms, park_ms)
  local flight = redis.call('HMGET', home, 'fence', 'started', 'again')
  local outcome = pack('E', flight[1], tonumber(flight[2]) or now, error_ms, error_ms, form, body)
  local store_as = home == FLIGHT and not flight[3] and ERROR
  conclude(home, flight[1], outcome, store_as, error_ms, park_ms)
  return outcome
end

-- One more worker died over the current flight. At the limit the flight fails for all its waiters: a poison
-- task must not eat one worker after another. Returns the error's record then.
local function crashed(limit, form, body, error_ms, park_ms)
  if redis.call('HINCRBY', FLIGHT, 'crashes', 1) < limit then
    return nil
  end
  return fail(FLIGHT, form, body, error_ms, park_ms)
end
