"""The Lua scripts: every write that must be atomic, with the shape of a request's record.

Owns: the fields of records and loads, and when each may change; those that go through whole streams
are in queue_scripts.py. Knows nothing of who calls (requests.py, registry.py, reaper.py give the
typed functions). All are idempotent: a caller that lost the answer calls again. Only ACCEPT, which
brings new work, is refused by a Redis that is out of memory: what was accepted can always end.

Record of a request (hash), readable with `redis-cli hgetall`:

    state, attempt                      the least advanced choice; the highest attempt
    gateway, model, prompt_len, priority, deadline_ms, choices ("0,1"), accepted_at, ended_at
    pinned                              the one node that may compute it; "": any
    a<attempt>.choices                  which choices this attempt computes
    a<attempt>.node                     in whose stream it lies, or lay
    a<attempt>.stream, .entry           that stream's key and the entry's id, until it is claimed;
                                        absent: nobody can take it from there any more
    a<attempt>.returned                 1: a node that left gave it back unclaimed, to its gateway
    a<attempt>.load                     prompt tokens still counted in that node's load; else absent
    a<attempt>.claim                    the incarnation that won it; absent: nobody yet
    c<choice>.attempt, c<choice>.state  only ever raised, see request_state.py
    c<choice>.<state>_at                unix ms, on Redis' clock, of the first time in this attempt
    c<choice>.prefill_node, .decode_node, .load (the node whose load counts it as decoding)
    c<choice>.generated, .cached_tokens, .seconds.<stage>, .finish_reason, .error, .message

Entry of a stream: request, attempt, dispatch (the encoded message).
Load of a node (hash): requests, prompt_tokens; absent when both are 0.
"""

from __future__ import annotations

from common.redis_client import Script
from common.redis_keys import DEAD_LETTERS, INSPECT_TTL_S, RECENT_REQUESTS, WORK_TTL_S
from common.request_state import RANK, State

GROUP = "node"  # the one consumer group of every stream

_RANKS = ", ".join(f"{state.value} = {rank}" for state, rank in RANK.items())

PRELUDE = (
    f"""
local GROUP = '{GROUP}'
local RANK = {{ {_RANKS} }}
local TERMINAL = {min(state.rank for state in State if state.terminal)}
local WORK_TTL, INSPECT_TTL = {WORK_TTL_S}, {INSPECT_TTL_S}
"""
    + """
local function now_ms()
  local time = redis.call('TIME')
  return string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
end

local function list(text)
  local items = {}
  for item in string.gmatch(text or '', '[^,]+') do items[#items + 1] = item end
  return items
end

local function get(record, field) return redis.call('HGET', record, field) end

-- A write that needs no memory. After it, Redis lets the script finish even when memory is short.
local function write_though_full(record) redis.call('HDEL', record, '') end

-- Whether its node has opened this stream and not left.
local function is_open(stream)
  return redis.call('EXISTS', stream) == 1 and #redis.call('XINFO', 'GROUPS', stream) > 0
end

local function delete_entry(stream, id)
  redis.call('XACK', stream, GROUP, id)
  redis.call('XDEL', stream, id)
  if redis.call('XLEN', stream) == 0 and not is_open(stream) then redis.call('DEL', stream) end
end

-- An attempt that nobody has claimed, and that nobody shall.
local function drop_entry(record, attempt)
  local prefix = 'a' .. attempt .. '.'
  local stream, id = get(record, prefix .. 'stream'), get(record, prefix .. 'entry')
  if stream then
    redis.call('HDEL', record, prefix .. 'stream', prefix .. 'entry')
    delete_entry(stream, id)
  end
end

local function add_load(stem, node, requests, tokens)
  local load = stem .. node
  if requests < 0 and redis.call('EXISTS', load) == 0 then return end
  local left = redis.call('HINCRBY', load, 'requests', requests)
  redis.call('HINCRBY', load, 'prompt_tokens', tokens)
  if left <= 0 then redis.call('DEL', load) else redis.call('EXPIRE', load, WORK_TTL) end
end

-- What an attempt's prompt adds to its node's load, taken back at most once.
local function drop_attempt_load(record, stem, attempt)
  local tokens = get(record, 'a' .. attempt .. '.load')
  if tokens then
    redis.call('HDEL', record, 'a' .. attempt .. '.load')
    add_load(stem, get(record, 'a' .. attempt .. '.node'), -1, -tonumber(tokens))
  end
end

local function drop_choice_load(record, stem, choice)
  local node = get(record, 'c' .. choice .. '.load')
  if node then
    redis.call('HDEL', record, 'c' .. choice .. '.load')
    add_load(stem, node, -1, 0)
  end
end

-- When every choice of it decodes, has ended or was superseded, an attempt's prompt is off its node,
-- and its entry, if nobody has claimed it, out of the stream.
local function settle_attempt(record, stem, attempt)
  for _, choice in ipairs(list(get(record, 'a' .. attempt .. '.choices'))) do
    local current = tonumber(get(record, 'c' .. choice .. '.attempt'))
    local rank = RANK[get(record, 'c' .. choice .. '.state')]
    if current == attempt and rank < RANK.decoding then return end
  end
  drop_attempt_load(record, stem, attempt)
  drop_entry(record, attempt)
end

-- A choice enters a newer attempt: nothing of the older one is about it any more.
local function restart_choice(record, stem, choice, attempt)
  local prefix, old = 'c' .. choice .. '.', tonumber(get(record, 'c' .. choice .. '.attempt'))
  drop_choice_load(record, stem, choice)
  for _, field in ipairs(redis.call('HKEYS', record)) do
    if string.sub(field, 1, #prefix) == prefix then redis.call('HDEL', record, field) end
  end
  redis.call('HSET', record, prefix .. 'attempt', attempt, prefix .. 'state', 'queued',
             prefix .. 'queued_at', now_ms())
  if old then settle_attempt(record, stem, old) end
end

-- Raise a choice to (attempt, state). Returns whether the write is of the current attempt, and
-- whether it raised the state.
local function raise(record, stem, choice, attempt, state)
  local prefix = 'c' .. choice .. '.'
  local current = tonumber(get(record, prefix .. 'attempt'))
  if not current or attempt < current then return false, false end
  if attempt > current then restart_choice(record, stem, choice, attempt) end
  if RANK[state] <= RANK[get(record, prefix .. 'state')] then return true, false end
  redis.call('HSET', record, prefix .. 'state', state, prefix .. state .. '_at', now_ms())
  if RANK[state] >= TERMINAL then drop_choice_load(record, stem, choice) end
  settle_attempt(record, stem, attempt)
  return true, true
end

-- What holds for the request as a whole, and with it its time to live. Returns 1 when it is closed.
local function conclude(record, open_stem, request)
  local lowest, highest = nil, 0
  for _, choice in ipairs(list(get(record, 'choices'))) do
    local state = get(record, 'c' .. choice .. '.state')
    if not lowest or RANK[state] < RANK[lowest] then lowest = state end
    highest = math.max(highest, tonumber(get(record, 'c' .. choice .. '.attempt')))
  end
  redis.call('HSET', record, 'state', lowest, 'attempt', highest)
  local open = open_stem .. get(record, 'gateway')
  if RANK[lowest] >= TERMINAL then
    redis.call('SREM', open, request)
    if redis.call('HSETNX', record, 'ended_at', now_ms()) == 1 then
      redis.call('EXPIRE', record, INSPECT_TTL)
    end
    return 1
  end
  redis.call('HDEL', record, 'ended_at')
  redis.call('EXPIRE', record, WORK_TTL)
  redis.call('SADD', open, request)
  redis.call('EXPIRE', open, WORK_TTL)
  return 0
end
"""
)

# KEYS: record, stream of the node, recent requests.
# ARGV: load stem, open stem, request, attempt, choices, node, prompt tokens counted as load,
#       encoded dispatch, claimed by ("" : put it into the stream), then record fields in pairs.
# Returns 1 if this attempt is new, 0 if it was known already, is superseded, or has ended: an end may
# be served before the acceptance.
ACCEPT = Script(
    PRELUDE
    + f"""
local record, stream, recent = KEYS[1], KEYS[2], KEYS[3]
local load_stem, open_stem, request = ARGV[1], ARGV[2], ARGV[3]
local attempt, choices, node, tokens = tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7]
if redis.call('HEXISTS', record, 'a' .. attempt .. '.choices') == 1 then return 0 end
for _, choice in ipairs(list(choices)) do
  local current = tonumber(get(record, 'c' .. choice .. '.attempt'))
  if current and current > attempt then return 0 end
  if current == attempt and RANK[get(record, 'c' .. choice .. '.state')] >= TERMINAL then return 0 end
end
if redis.call('HSETNX', record, 'accepted_at', now_ms()) == 1 then
  redis.call('ZADD', recent, get(record, 'accepted_at'), request)
  redis.call('ZREMRANGEBYRANK', recent, 0, -{RECENT_REQUESTS + 1})
end
redis.call('HSET', record, unpack(ARGV, 10))
redis.call('HSET', record, 'a' .. attempt .. '.choices', choices, 'a' .. attempt .. '.node', node)
local known = ',' .. (get(record, 'choices') or '') .. ','
for _, choice in ipairs(list(choices)) do
  if not string.find(known, ',' .. choice .. ',', 1, true) then known = known .. choice .. ',' end
  if tonumber(get(record, 'c' .. choice .. '.attempt')) ~= attempt then
    restart_choice(record, load_stem, choice, attempt)
  end
end
redis.call('HSET', record, 'choices', table.concat(list(known), ','),
           'a' .. attempt .. '.load', tokens)
add_load(load_stem, node, 1, tonumber(tokens))
if ARGV[9] == '' then
  local id =
    redis.call('XADD', stream, '*', 'request', request, 'attempt', attempt, 'dispatch', ARGV[8])
  redis.call('EXPIRE', stream, WORK_TTL)
  redis.call('HSET', record, 'a' .. attempt .. '.stream', stream, 'a' .. attempt .. '.entry', id)
else
  redis.call('HSET', record, 'a' .. attempt .. '.claim', ARGV[9])
end
conclude(record, open_stem, request)
return 1
"""
)

# KEYS: record. ARGV: load stem, open stem, request, attempt, incarnation.
# Returns won | held | lost | superseded | unknown.
CLAIM = Script(
    PRELUDE
    + """
local record, attempt, incarnation = KEYS[1], tonumber(ARGV[4]), ARGV[5]
local choices = list(get(record, 'a' .. attempt .. '.choices'))
if #choices == 0 then return 'unknown' end
local live = {}
for _, choice in ipairs(choices) do
  if tonumber(get(record, 'c' .. choice .. '.attempt')) == attempt
     and RANK[get(record, 'c' .. choice .. '.state')] < TERMINAL then
    live[#live + 1] = choice
  end
end
if #live == 0 then return 'superseded' end
local holder = get(record, 'a' .. attempt .. '.claim')
if holder == incarnation then return 'held' end
if holder then return 'lost' end
redis.call('HDEL', record, 'a' .. attempt .. '.stream', 'a' .. attempt .. '.entry')
redis.call('HSET', record, 'a' .. attempt .. '.claim', incarnation)
for _, choice in ipairs(live) do
  raise(record, ARGV[1], choice, attempt, 'prefilling')
  redis.call('HSET', record, 'c' .. choice .. '.prefill_node', incarnation)
end
conclude(record, ARGV[2], ARGV[3])
return 'won'
"""
)

# KEYS: a record for each. ARGV: an attempt and a choice for each key.
# Returns for each where that choice is, of unknown | queued | claimed | returned | nowhere, and the
# node of the queue or of the claim, else "".
LOCATE = Script(
    PRELUDE
    + """
local answers = {}
for i, record in ipairs(KEYS) do
  local attempt, choice = ARGV[2 * i - 1], ARGV[2 * i]
  local at, place, node = 'a' .. attempt .. '.', 'nowhere', ''
  local current, state = get(record, 'c' .. choice .. '.attempt'), get(record, 'c' .. choice .. '.state')
  local claim, stream = get(record, at .. 'claim'), get(record, at .. 'stream')
  if redis.call('HEXISTS', record, at .. 'choices') == 0 then
    place = 'unknown'
  elseif current ~= attempt or RANK[state] >= TERMINAL then
    place = 'nowhere'
  elseif claim then
    place, node = 'claimed', claim
  elseif stream and redis.call('EXISTS', stream) == 1 then
    place, node = 'queued', get(record, at .. 'node')
  elseif get(record, at .. 'returned') then
    place = 'returned'
  end
  answers[i] = {place, node}
end
return answers
"""
)

# KEYS: record. ARGV: load stem, open stem, request, attempt ("" : whatever each choice is in),
# choices ("" : all that have not ended), state, node ("" : none), count of maxima, then the maxima
# in pairs (fields that only grow), then fields in pairs that go with a state that was raised.
# Returns -1 without a record, else the number of choices whose state was raised.
MERGE = Script(
    PRELUDE
    + """
local record, load_stem = KEYS[1], ARGV[1]
if redis.call('EXISTS', record) == 0 then return -1 end
write_though_full(record)
local state, node, maxima, raised = ARGV[6], ARGV[7], tonumber(ARGV[8]), 0
local open_only, choices = ARGV[5] == '', list(ARGV[5])
if open_only then choices = list(get(record, 'choices')) end
for _, choice in ipairs(choices) do
  local prefix = 'c' .. choice .. '.'
  local attempt = tonumber(ARGV[4]) or tonumber(get(record, prefix .. 'attempt'))
  local ended = RANK[get(record, prefix .. 'state') or 'failed'] >= TERMINAL
  local current, changed = false, false
  if not (open_only and ended) then
    current, changed = raise(record, load_stem, choice, attempt, state)
  end
  if current then
    for i = 9, 8 + 2 * maxima, 2 do
      local old = tonumber(get(record, prefix .. ARGV[i]))
      if not old or tonumber(ARGV[i + 1]) > old then
        redis.call('HSET', record, prefix .. ARGV[i], ARGV[i + 1])
      end
    end
    if node ~= '' and state == 'prefilling' then
      redis.call('HSET', record, prefix .. 'prefill_node', node)
    elseif node ~= '' and state == 'decoding' then
      redis.call('HSET', record, prefix .. 'decode_node', node)
      local at = get(record, prefix .. 'load')
      if changed or (at and at ~= node) then  -- a choice that moves takes its load with it
        drop_choice_load(record, load_stem, choice)
        redis.call('HSET', record, prefix .. 'load', node)
        add_load(load_stem, node, 1, 0)
      end
    end
  end
  if changed then
    raised = raised + 1
    for i = 9 + 2 * maxima, #ARGV, 2 do
      redis.call('HSET', record, prefix .. ARGV[i], ARGV[i + 1])
    end
  end
end
conclude(record, ARGV[2], ARGV[3])
return raised
"""
)

# KEYS: sets of open requests, then loads of nodes. ARGV: number of sets, record stem, load stem, most
# requests to go through. What the open requests count in is what the loads are; returns how many were
# not, or -1 if there are too many requests.
RECOUNT = Script(
    PRELUDE
    + """
local sets, stem, load_stem, total = tonumber(ARGV[1]), ARGV[2], ARGV[3], 0
for i = 1, sets do total = total + redis.call('SCARD', KEYS[i]) end
if total > tonumber(ARGV[4]) then return -1 end
local requests, tokens, wrong = {}, {}, 0
local function count(node, number)
  requests[node], tokens[node] = (requests[node] or 0) + 1, (tokens[node] or 0) + tonumber(number)
end
for i = 1, sets do
  for _, request in ipairs(redis.call('SMEMBERS', KEYS[i])) do
    local record, seen = stem .. request, {}
    for _, choice in ipairs(list(get(record, 'choices'))) do
      local attempt = get(record, 'c' .. choice .. '.attempt') or ''
      local decoding = get(record, 'c' .. choice .. '.load')
      local prompt = not seen[attempt] and get(record, 'a' .. attempt .. '.load')
      seen[attempt] = true
      if prompt then count(get(record, 'a' .. attempt .. '.node'), prompt) end
      if decoding then count(decoding, 0) end
    end
  end
end
for i = sets + 1, #KEYS do
  local node = string.sub(KEYS[i], #load_stem + 1)
  local is = {get(KEYS[i], 'requests') or '0', get(KEYS[i], 'prompt_tokens') or '0'}
  local should = {requests[node] or 0, tokens[node] or 0}
  if tonumber(is[1]) ~= should[1] or tonumber(is[2]) ~= should[2] then
    wrong = wrong + 1
    redis.call('DEL', KEYS[i])
    if should[1] > 0 then add_load(load_stem, node, should[1], should[2]) end
  end
end
return wrong
"""
)

# KEYS: dead letters. ARGV: fields in pairs.
DEAD_LETTER = Script(f"""
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', {DEAD_LETTERS}, '*', unpack(ARGV))
""")

# KEYS: record, index. ARGV: incarnation, time to live, 1 if these are all of the record's fields,
# fields in pairs. Returns unix ms; 0, and nothing written, for some fields of a record that is gone.
ANNOUNCE = Script(
    PRELUDE
    + """
if ARGV[3] == '0' and redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local now = now_ms()
write_though_full(KEYS[1])
redis.call('HSET', KEYS[1], 'beat_at', now, unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], now, ARGV[1])
return now
"""
)

# KEYS: lock. ARGV: name, time to live in ms. Returns 1 if the lock is ours, now renewed.
LOCK = Script("""
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])  -- so that a Redis without memory lets us write: reaping frees some
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

# KEYS: lock. ARGV: name. Returns 1 if it was ours.
UNLOCK = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")
