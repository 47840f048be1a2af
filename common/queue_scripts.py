"""The Lua scripts that go through a whole stream: moving, giving back, dropping, leaving.

Owns: what may happen to an entry that nobody has claimed. One rule holds in all of them: an entry
counts only while the record of its attempt names it (`a<attempt>.stream` and `.entry`), and whoever
moves or deletes such an entry says so in the record, in the same script. So whoever reads the record
knows whom an attempt waits for, or that it waits for nobody. queue.py, registry.py and reaper.py
give the typed functions. All are idempotent.

Entry of a stream: request, attempt, dispatch (the encoded message).
"""

from __future__ import annotations

from common.redis_client import Script
from common.redis_scripts import PRELUDE

PAGE = 16  # entries in hand at once: a long prompt's takes half a megabyte

_STREAMS = (
    PRELUDE
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

# KEYS: stream to take from, stream to add to. ARGV: count, node to add to, record stem, load stem.
# The oldest unread entries go first; on the way those no longer wanted are deleted, and those that are
# for one node only stay. A stream that is not open gets nothing: its node has left, and this call is
# late. Returns the number moved.
MOVE_UNREAD = Script(
    _STREAMS
    + """
local from, to, count = KEYS[1], KEYS[2], tonumber(ARGV[1])
if from == to or redis.call('EXISTS', from) == 0 or not is_open(to) then return 0 end
local after = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', from)) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == GROUP then after = fields['last-delivered-id'] end
end
local moved = 0
while moved < count do
  local page = redis.call('XRANGE', from, '(' .. after, '+', 'COUNT', math.min(PAGE, count - moved))
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    local record, attempt = wanted(ARGV[3], from, entry)
    if record and is_pinned(record) then
      after = entry[1]
    elseif record then
      move_entry(from, entry, to, ARGV[2], record, attempt, ARGV[4])
      moved = moved + 1
    else
      delete_entry(from, entry[1])
    end
  end
end
return moved
"""
)

# KEYS: stream, stream to add to. ARGV: node to add to ("" : to the gateways), record stem, load stem.
# What was claimed stays. Returns the number given back, 0 if the other stream is not open.
GIVE_BACK = Script(
    _STREAMS
    + """
if ARGV[1] ~= '' and (KEYS[1] == KEYS[2] or not is_open(KEYS[2])) then return 0 end
return give_back(KEYS[1], ARGV[2], ARGV[3], KEYS[2], ARGV[1])
"""
)

# KEYS: stream. ARGV: record stem, load stem, ids. Entries that their reader cannot or need not compute.
DROP = Script(
    _STREAMS
    + """
for i = 3, #ARGV do
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])) do
    local record, attempt = wanted(ARGV[1], KEYS[1], entry)
    if record then
      drop_attempt_load(record, ARGV[2], attempt)
      drop_entry(record, attempt)
    end
  end
  delete_entry(KEYS[1], ARGV[i])
end
return 1
"""
)

# KEYS: record of a node, index, stream, load. ARGV: incarnation, record stem, load stem.
# It is gone, or wants to be: what nobody has claimed goes to the gateways, the rest is deleted.
# Returns the number given back.
LEAVE = Script(
    _STREAMS
    + """
local count = give_back(KEYS[3], ARGV[2], ARGV[3], '', '')
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('ZREM', KEYS[2], ARGV[1])
return count
"""
)

# KEYS: streams. Returns {entries, of these at work} of each.
QUEUE_LENGTHS = Script(
    PRELUDE
    + """
local lengths = {}
for i, stream in ipairs(KEYS) do
  local pending = redis.pcall('XPENDING', stream, GROUP)  -- an error where there is no group
  lengths[i] = {redis.call('XLEN', stream), pending.err and 0 or pending[1]}
end
return lengths
"""
)
