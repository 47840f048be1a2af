"""The Lua scripts of the registry and the reaper: who is there, and who cleans up after the dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.store.keys import NODE_TTL_S, Key
from common.store.lua import Script
from common.store.node_record import BEAT
from common.store.queue_scripts import STREAMS
from common.store.records import RECORDS

BEAT_FIELDS = ", ".join(f"'{name}'" for name in ("identity", *BEAT))


class AnnounceNode(Script[bool], library=RECORDS):
    """Writes a beat of the numbers BEAT, and `fields` of an identity with the digest `identity`. False,
    and nothing written, if they are not the `whole` of it and there is none."""

    node: Key
    beat: Key
    nodes: Key
    incarnation: str
    whole: bool
    fields: Mapping[str, str]
    identity: str
    numbers: Sequence[str]

    LUA = f"""
if not whole and redis.call('EXISTS', node) == 0 then return false end
local now, names, values = now_ms(), {{{BEAT_FIELDS}}}, {{identity, unpack(numbers)}}
local written = {{'at', now}}
for i, name in ipairs(names) do
  written[#written + 1] = name
  written[#written + 1] = values[i]
end
write_though_full(beat)
if #fields > 0 then redis.call('HSET', node, unpack(fields)) end
redis.call('HSET', beat, unpack(written))
redis.call('EXPIRE', node, {NODE_TTL_S})
redis.call('EXPIRE', beat, {NODE_TTL_S})
redis.call('ZADD', nodes, now, incarnation)
return true
"""


class ReadBeats(Script[str], library=RECORDS):
    """All beats as JSON: [incarnation, ms since its last beat, [identity, number, …]] of each, `false`
    for what is not there. One text, because a client takes its time over lists."""

    nodes: Key
    beat_stem: Key

    LUA = f"""
local now, found = tonumber(now_ms()), {{}}
local index = redis.call('ZRANGE', nodes, 0, -1, 'WITHSCORES')
for i = 1, #index, 2 do
  local values = redis.call('HMGET', beat_stem .. index[i], {BEAT_FIELDS})
  found[#found + 1] = {{index[i], now - tonumber(index[i + 1]), values}}
end
return cjson.encode(found)
"""


class RemoveNode(Script[int], library=STREAMS):
    """Deletes what an incarnation has in Redis: it is gone, or wants to be. What nobody has claimed goes
    to the gateways; the number of these entries."""

    node: Key
    beat: Key
    nodes: Key
    stream: Key
    load: Key
    incarnation: str
    record_stem: Key
    load_stem: Key

    LUA = """
local count = give_back(stream, record_stem, load_stem, '', '')
redis.call('DEL', node, beat, stream, load)
redis.call('ZREM', nodes, incarnation)
return count
"""


class TakeLock(Script[bool]):
    """Whether the lock is ours, now renewed."""

    lock: Key
    name: str
    ttl_ms: int

    LUA = """
local holder = redis.call('GET', lock)
if holder and holder ~= name then return false end
redis.call('DEL', lock)  -- so that a Redis without memory lets us write: reaping frees some
redis.call('SET', lock, name, 'PX', ttl_ms)
return true
"""


class ReleaseLock(Script[bool]):
    """Whether the lock was ours."""

    lock: Key
    name: str

    LUA = """
if redis.call('GET', lock) ~= name then return false end
return redis.call('DEL', lock)
"""
