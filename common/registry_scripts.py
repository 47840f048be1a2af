"""The Lua scripts of the registry and the reaper: who is there, and who cleans up after the dead."""

from __future__ import annotations

from collections.abc import Mapping

from common.queue_scripts import STREAMS
from common.redis_keys import Key
from common.redis_lua import Script
from common.redis_records import RECORDS


class AnnounceNode(Script[bool], library=RECORDS):
    """Writes fields of a node's record and its beat. False, and nothing written, if they are not `whole`
    and the record is gone."""

    record: Key
    nodes: Key
    incarnation: str
    ttl_s: int
    whole: bool
    fields: Mapping[str, str]

    LUA = """
if not whole and redis.call('EXISTS', record) == 0 then return false end
local now = now_ms()
write_though_full(record)
redis.call('HSET', record, 'beat_at', now, unpack(fields))
redis.call('EXPIRE', record, ttl_s)
redis.call('ZADD', nodes, now, incarnation)
return true
"""


class RemoveNode(Script[int], library=STREAMS):
    """Deletes what an incarnation has in Redis: it is gone, or wants to be. What nobody has claimed goes
    to the gateways; the number of these entries."""

    node: Key
    nodes: Key
    stream: Key
    load: Key
    incarnation: str
    record_stem: Key
    load_stem: Key

    LUA = """
local count = give_back(stream, record_stem, load_stem, '', '')
redis.call('DEL', node, stream, load)
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
