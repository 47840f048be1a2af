"""The shape of a request's record in Redis, and the Lua functions that every script keeps it with.

Owns: the fields of records and loads, and when each may change. The scripts themselves stand beside
who calls them: request_scripts.py, queue_scripts.py, registry_scripts.py. All are idempotent: a caller
that lost the answer calls again. Only `AcceptAttempt`, which brings new work, is refused by a Redis
that is out of memory: what was accepted can always end.

`load_stem`, `open_stem` and `record_stem` are stems of families of `Keys`, which a script completes
with names that only it reads.

Record of a request (hash), readable with `redis-cli hgetall`:

    state, attempt                      the least advanced choice; the highest attempt
    gateway, model, prompt_len, priority, choices ("0,1"), accepted_at, ended_at
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

from common.store.keys import INSPECT_TTL_S, WORK_TTL_S
from common.store.request_state import RANK, State

GROUP = "node"  # the one consumer group of every stream

_RANKS = ", ".join(f"{state.value} = {rank}" for state, rank in RANK.items())

RECORDS = (
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
