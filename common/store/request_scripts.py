"""The Lua scripts that write and read records of requests (records.py); requests.py calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.store.keys import DEAD_LETTERS, RECENT_REQUESTS, Key
from common.store.lua import Script
from common.store.records import RECORDS
from common.store.request_state import Claim, Place


class AcceptAttempt(Script[bool], library=RECORDS):
    """Writes the record of an attempt, and puts it into the stream of `node` unless `claimed_by` has it
    already. False if this attempt was known, is superseded, or has ended: an end may be served before
    the acceptance. `tokens` of its prompt count in the node's load."""

    record: Key
    stream: Key
    recent: Key
    load_stem: Key
    open_stem: Key
    request: str
    attempt: int
    choices: Sequence[int]
    node: str
    tokens: int
    dispatch: bytes
    claimed_by: str
    fields: Mapping[str, str | int]

    LUA = f"""
local at = 'a' .. attempt .. '.'
if redis.call('HEXISTS', record, at .. 'choices') == 1 then return false end
for _, choice in ipairs(choices) do
  local current = tonumber(get(record, 'c' .. choice .. '.attempt'))
  if current and current > attempt then return false end
  if current == attempt and RANK[get(record, 'c' .. choice .. '.state')] >= TERMINAL then
    return false
  end
end
if redis.call('HSETNX', record, 'accepted_at', now_ms()) == 1 then
  redis.call('ZADD', recent, get(record, 'accepted_at'), request)
  redis.call('ZREMRANGEBYRANK', recent, 0, -{RECENT_REQUESTS + 1})
end
redis.call('HSET', record, unpack(fields))
redis.call('HSET', record, at .. 'choices', table.concat(choices, ','), at .. 'node', node)
local known = ',' .. (get(record, 'choices') or '') .. ','
for _, choice in ipairs(choices) do
  if not string.find(known, ',' .. choice .. ',', 1, true) then known = known .. choice .. ',' end
  if tonumber(get(record, 'c' .. choice .. '.attempt')) ~= attempt then
    restart_choice(record, load_stem, choice, attempt)
  end
end
redis.call('HSET', record, 'choices', table.concat(list(known), ','), at .. 'load', tokens)
add_load(load_stem, node, 1, tokens)
if claimed_by == '' then
  local id =
    redis.call('XADD', stream, '*', 'request', request, 'attempt', attempt, 'dispatch', dispatch)
  redis.call('EXPIRE', stream, WORK_TTL)
  redis.call('HSET', record, at .. 'stream', stream, at .. 'entry', id)
else
  redis.call('HSET', record, at .. 'claim', claimed_by)
end
conclude(record, open_stem, request)
return true
"""


class ClaimAttempt(Script[Claim], library=RECORDS):
    """Makes `incarnation` the one that computes an attempt, unless another one does."""

    record: Key
    load_stem: Key
    open_stem: Key
    request: str
    attempt: int
    incarnation: str

    LUA = """
local at = 'a' .. attempt .. '.'
local choices = list(get(record, at .. 'choices'))
if #choices == 0 then return 'unknown' end
local live = {}
for _, choice in ipairs(choices) do
  if tonumber(get(record, 'c' .. choice .. '.attempt')) == attempt
     and RANK[get(record, 'c' .. choice .. '.state')] < TERMINAL then
    live[#live + 1] = choice
  end
end
if #live == 0 then return 'superseded' end
local holder = get(record, at .. 'claim')
if holder == incarnation then return 'held' end
if holder then return 'lost' end
redis.call('HDEL', record, at .. 'stream', at .. 'entry')
redis.call('HSET', record, at .. 'claim', incarnation)
for _, choice in ipairs(live) do
  raise(record, load_stem, choice, attempt, 'prefilling')
  redis.call('HSET', record, 'c' .. choice .. '.prefill_node', incarnation)
end
conclude(record, open_stem, request)
return 'won'
"""


class LocateChoices(Script[list[tuple[Place, str]]], library=RECORDS):
    """Where each choice is, in its attempt: the place, and the node of the queue or of the claim, else
    "". The three lists are of equal length."""

    records: Sequence[Key]
    attempts: Sequence[int]
    choices: Sequence[int]

    LUA = """
local answers = {}
for i, record in ipairs(records) do
  local at, place, node = 'a' .. attempts[i] .. '.', 'nowhere', ''
  local current = tonumber(get(record, 'c' .. choices[i] .. '.attempt'))
  local claim, stream = get(record, at .. 'claim'), get(record, at .. 'stream')
  if redis.call('HEXISTS', record, at .. 'choices') == 0 then
    place = 'unknown'
  elseif current ~= attempts[i]
         or RANK[get(record, 'c' .. choices[i] .. '.state')] >= TERMINAL then
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


class MergeChoices(Script[int], library=RECORDS):
    """Merges what is known of choices; how many were raised to `state`, -1 without a record.

    No `attempt`: whatever each choice is in. No `choices`: all that have not ended. `maxima` are fields
    that only grow, `ending` those that go with a state that was raised."""

    record: Key
    load_stem: Key
    open_stem: Key
    request: str
    attempt: int | None
    choices: Sequence[int]
    state: str
    node: str
    maxima: Mapping[str, str | int]
    ending: Mapping[str, str]

    LUA = """
if redis.call('EXISTS', record) == 0 then return -1 end
write_though_full(record)
local open_only, raised = #choices == 0, 0
for _, choice in ipairs(open_only and list(get(record, 'choices')) or choices) do
  local prefix = 'c' .. choice .. '.'
  local ended = RANK[get(record, prefix .. 'state') or 'failed'] >= TERMINAL
  local current, changed = false, false
  if not (open_only and ended) then
    local wanted = attempt or tonumber(get(record, prefix .. 'attempt'))
    current, changed = raise(record, load_stem, choice, wanted, state)
  end
  if current then
    for i = 1, #maxima, 2 do
      local old = tonumber(get(record, prefix .. maxima[i]))
      if not old or tonumber(maxima[i + 1]) > old then
        redis.call('HSET', record, prefix .. maxima[i], maxima[i + 1])
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
    for i = 1, #ending, 2 do redis.call('HSET', record, prefix .. ending[i], ending[i + 1]) end
  end
end
conclude(record, open_stem, request)
return raised
"""


class RecountLoads(Script[int], library=RECORDS):
    """Sets the loads to what the open requests count in; how many were something else, -1 if there are
    more than `most` requests."""

    open_requests: Sequence[Key]
    loads: Sequence[Key]
    record_stem: Key
    load_stem: Key
    most: int

    LUA = """
local total = 0
for _, open in ipairs(open_requests) do total = total + redis.call('SCARD', open) end
if total > most then return -1 end
local requests, tokens, wrong = {}, {}, 0
local function count(node, number)
  requests[node], tokens[node] = (requests[node] or 0) + 1, (tokens[node] or 0) + tonumber(number)
end
for _, open in ipairs(open_requests) do
  for _, request in ipairs(redis.call('SMEMBERS', open)) do
    local record, seen = record_stem .. request, {}
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
for _, load in ipairs(loads) do
  local node = string.sub(load, #load_stem + 1)
  local is = {get(load, 'requests') or '0', get(load, 'prompt_tokens') or '0'}
  local should = {requests[node] or 0, tokens[node] or 0}
  if tonumber(is[1]) ~= should[1] or tonumber(is[2]) ~= should[2] then
    wrong = wrong + 1
    redis.call('DEL', load)
    if should[1] > 0 then add_load(load_stem, node, should[1], should[2]) end
  end
end
return wrong
"""


class AddDeadLetter(Script[str]):
    """The id of the new entry."""

    dead_letters: Key
    fields: Mapping[str, str | bytes | int]

    LUA = f"""
return redis.call('XADD', dead_letters, 'MAXLEN', '~', {DEAD_LETTERS}, '*', unpack(fields))
"""
