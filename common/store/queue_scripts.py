"""The Lua scripts that go through a whole stream: moving, giving back, dropping.

Owns: what may happen to an entry that nobody has claimed. One rule holds in all of them: an entry
counts only while the record of its attempt names it (`a<attempt>.stream` and `.entry`), and whoever
moves or deletes such an entry says so in the record, in the same script. So whoever reads the record
knows whom an attempt waits for, or that it waits for nobody. All are idempotent.

Entry of a stream: request, attempt, dispatch (the encoded message).
"""

from __future__ import annotations

from collections.abc import Sequence

from common.store.keys import Key
from common.store.lua import Script
from common.store.records import RECORDS

PAGE = 16  # entries in hand at once: a long prompt's takes half a megabyte

STREAMS = (
    RECORDS
    + f"""
local PAGE = {PAGE}
"""
    + """
-- The record of an entry's attempt and the attempt; nothing if the record does not name this entry.
local function wanted(stem, stream, entry)
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  local record, attempt = stem .. (fields['request'] or ''), fields['attempt'] or ''
  local prefix = 'a' .. attempt .. '.'
  if get(record, prefix .. 'entry') == entry[1] and get(record, prefix .. 'stream') == stream then
    return record, attempt
  end
end

local function is_pinned(record) return (get(record, 'pinned') or '') ~= '' end

-- To the end of an open stream, load included.
local function move_entry(from, entry, to, node, record, attempt, load_stem)
  local prefix = 'a' .. attempt .. '.'
  delete_entry(from, entry[1])
  local id = redis.call('XADD', to, '*', unpack(entry[2]))
  redis.call('EXPIRE', to, WORK_TTL)
  local tokens = get(record, prefix .. 'load')
  if tokens then
    add_load(load_stem, get(record, prefix .. 'node'), -1, -tonumber(tokens))
    add_load(load_stem, node, 1, tonumber(tokens))
  end
  redis.call('HSET', record, prefix .. 'node', node, prefix .. 'stream', to, prefix .. 'entry', id)
end

-- To the gateway, which makes another attempt as soon as it reads the record.
local function return_entry(record, attempt, load_stem)
  drop_attempt_load(record, load_stem, attempt)
  drop_entry(record, attempt)
  redis.call('HSET', record, 'a' .. attempt .. '.returned', 1)
end

-- Every entry that nobody has claimed, wanted or not, oldest first; the number of those wanted.
local function give_back(stream, stem, load_stem, to, node)
  local after, count = '-', 0
  while true do
    local page = redis.call('XRANGE', stream, after, '+', 'COUNT', PAGE)
    if #page == 0 then return count end
    for _, entry in ipairs(page) do
      after = '(' .. entry[1]
      local record, attempt = wanted(stem, stream, entry)
      if record then
        count = count + 1
        if node == '' or is_pinned(record) then
          return_entry(record, attempt, load_stem)
        else
          move_entry(stream, entry, to, node, record, attempt, load_stem)
        end
      end
    end
  end
end
"""
)


class MoveUnread(Script[int], library=STREAMS):
    """Moves up to `count` entries from one stream to another, the oldest unread first; the number moved.
    On the way those no longer wanted are deleted, and those that are for one node only stay. A stream
    that is not open gets nothing: its node has left, and this call is late."""

    source: Key
    target: Key
    count: int
    node: str
    record_stem: Key
    load_stem: Key

    LUA = """
if source == target or redis.call('EXISTS', source) == 0 or not is_open(target) then return 0 end
local after = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', source)) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == GROUP then after = fields['last-delivered-id'] end
end
local moved = 0
while moved < count do
  local most = math.min(PAGE, count - moved)
  local page = redis.call('XRANGE', source, '(' .. after, '+', 'COUNT', most)
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    local record, attempt = wanted(record_stem, source, entry)
    if record and is_pinned(record) then
      after = entry[1]
    elseif record then
      move_entry(source, entry, target, node, record, attempt, load_stem)
      moved = moved + 1
    else
      delete_entry(source, entry[1])
    end
  end
end
return moved
"""


class GiveBack(Script[int], library=STREAMS):
    """Moves every entry that nobody has claimed to the stream `target` of `node`, or gives it back to
    its gateway where `node` is ""; the number given back, 0 if that stream is not open."""

    stream: Key
    target: Key
    node: str
    record_stem: Key
    load_stem: Key

    LUA = """
if node ~= '' and (stream == target or not is_open(target)) then return 0 end
return give_back(stream, record_stem, load_stem, target, node)
"""


class DropEntries(Script[int], library=STREAMS):
    """Deletes entries that their reader cannot or need not compute; the number of them."""

    stream: Key
    record_stem: Key
    load_stem: Key
    ids: Sequence[str]

    LUA = """
for _, id in ipairs(ids) do
  for _, entry in ipairs(redis.call('XRANGE', stream, id, id)) do
    local record, attempt = wanted(record_stem, stream, entry)
    if record then
      drop_attempt_load(record, load_stem, attempt)
      drop_entry(record, attempt)
    end
  end
  delete_entry(stream, id)
end
return #ids
"""


class QueueLengths(Script[list[tuple[int, int]]], library=RECORDS):
    """Of each stream the number of entries, and of those at work."""

    streams: Sequence[Key]

    LUA = """
local lengths = {}
for i, stream in ipairs(streams) do
  local pending = redis.pcall('XPENDING', stream, GROUP)  -- an error where there is no group
  lengths[i] = {redis.call('XLEN', stream), pending.err and 0 or pending[1]}
end
return lengths
"""
