"""The Lua scripts of GPU leases: who computes on a GPU, decided in one place and at one moment.

A GPU's key is a hash, readable with `redis-cli hgetall`: incarnation → "ends settled shared permille",
the unix ms at which the lease is over (on Redis' clock), two flags, and the share of the memory.
A lease that is over and was not released stays until the next one is settled: its holder may live,
and only be out of reach.
"""

from __future__ import annotations

import enum

from common.store.keys import Key
from common.store.lua import Script

LEASES = """
local WHOLE = 1000  -- permille

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The leases on a GPU by holder: those that last, and those that are over and were not released.
local function leases_of(gpu, now)
  local lasting, over, stored = {}, {}, redis.call('HGETALL', gpu)
  for i = 1, #stored, 2 do
    local ends, settled, shared, permille = string.match(stored[i + 1], '^(%d+) (%d) (%d) (%d+)$')
    local kind = ends and tonumber(ends) > now and lasting or over
    kind[stored[i]] = {ends = tonumber(ends), settled = settled == '1', shared = shared == '1',
                       permille = tonumber(permille)}
  end
  return lasting, over
end

-- Whether so many permille and all of these fit together.
local function fits(permille, others)
  local sum = permille
  for _, lease in pairs(others) do
    if not lease.shared then return false end
    sum = sum + lease.permille
  end
  return sum <= WHOLE
end

-- For how many ms nothing can have been forgotten here. Redis counts its own life in seconds.
local function age_of_content(since, now)
  redis.call('SET', since, string.format('%.0f', now), 'NX')
  local uptime = string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)')
  return math.min(now - tonumber(redis.call('GET', since)), (tonumber(uptime) - 1) * 1000)
end
"""


class Hold(enum.StrEnum):
    """What a holder says when it asks."""

    CLAIM = "claim"  # "let me have it"; a lease that is settled stays so
    SETTLE = "settle"  # "nobody has objected": a lease that is there is settled
    ASSERT = "assert"  # "I have it all the time": whoever has only claimed it gives way


class Held(enum.StrEnum):
    """What comes of it."""

    FRESH = "fresh"  # claimed, and was not before
    CLAIMED = "claimed"
    SETTLED = "settled"
    TAKEN = "taken"  # by others; there is no lease of ours


class HoldGpu(Script[tuple[Held, list[tuple[str, int]]]], library=LEASES):
    """Takes, keeps or settles a lease on a GPU, or none of it; with those who have it if it is taken, and
    when their leases end.

    A claim is settled at once where nobody can have a better one: all that was said in the last
    `settle_ms` is there still, and nobody has left a lease to run out."""

    gpu: Key
    since: Key
    holder: str
    shared: bool
    permille: int
    how: str
    ttl_ms: int
    settle_ms: int
    kept_s: int

    LUA = """
redis.call('HDEL', gpu, '')  -- needs no memory; after it Redis lets the script finish though it has none
local now = now_ms()
local others, over = leases_of(gpu, now)
local own = others[holder]
others[holder], over[holder] = nil, nil
if how == 'assert' and not (shared and fits(permille, others)) then
  for other, lease in pairs(others) do
    if not lease.settled then
      redis.call('HDEL', gpu, other)
      others[other] = nil
    end
  end
end
if next(others) and not (shared and fits(permille, others)) then
  redis.call('HDEL', gpu, holder)
  local holders = {}
  for other, lease in pairs(others) do holders[#holders + 1] = {other, lease.ends} end
  return {'taken', holders}
end
local is_forgetful = age_of_content(since, now) < settle_ms
local settled = how == 'assert' or (own and (own.settled or how == 'settle'))
                or not (next(over) or is_forgetful)
if settled then
  for other in pairs(over) do redis.call('HDEL', gpu, other) end
end
redis.call('HSET', gpu, holder, string.format('%.0f %d %d %d', now + ttl_ms, settled and 1 or 0,
                                              shared and 1 or 0, permille))
redis.call('EXPIRE', gpu, kept_s)
return {settled and 'settled' or own and 'claimed' or 'fresh', {}}
"""


class ReleaseGpu(Script[bool]):
    """Whether there was a lease of this holder; there is none now."""

    gpu: Key
    holder: str

    LUA = "return redis.call('HDEL', gpu, holder)"
