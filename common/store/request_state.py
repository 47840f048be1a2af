"""The states of a request, which may follow which, and how concurrent writes are merged.

Owns: the two tables below, and what may be answered about an attempt. Knows nothing of Redis:
records.py carries `RANK` into Lua.

States belong to one choice of one attempt; what a request as a whole is in, is the least advanced
state of its choices. `NEXT` says what one writer may write after what. Writes of several writers
arrive in any order, and twice: a record keeps the larger (attempt, rank), which does not depend on
the order. Hence a late write of an older state or attempt changes nothing, and a state that was
skipped, because its write was lost, is no error.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    FAILED = "failed"
    CANCELLED = "cancelled"
    FINISHED = "finished"

    @property
    def terminal(self) -> bool:
        return not NEXT[self]

    @property
    def rank(self) -> int:
        return RANK[self]


class Claim(enum.StrEnum):
    """Answer to a claim."""

    WON = "won"
    HELD = "held"  # this incarnation has it already; an answer may have been lost
    LOST = "lost"  # another incarnation has it
    SUPERSEDED = "superseded"  # a newer attempt, or the request has ended
    UNKNOWN = "unknown"  # no such attempt: closed long ago, or Redis lost its content


class Place(enum.StrEnum):
    """Where a choice's attempt is, as long as nobody decodes it."""

    QUEUED = "queued"  # in a node's stream, or read and not claimed
    CLAIMED = "claimed"  # by a node that computes it, or is about to
    RETURNED = "returned"  # given back unclaimed by a node that left
    NOWHERE = "nowhere"  # nobody will compute it: its entry was dropped or lost, or it was ended
    UNKNOWN = "unknown"  # no such attempt: Redis lost its content, perhaps


_ENDS = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})

NEXT: dict[State, frozenset[State]] = {
    State.QUEUED: _ENDS | {State.PREFILLING},
    State.PREFILLING: _ENDS | {State.HANDING_OFF, State.DECODING},  # a unified node hands nothing
    State.HANDING_OFF: _ENDS | {State.DECODING},
    State.DECODING: _ENDS,
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.FINISHED: frozenset(),
}
"""Legal transitions within an attempt. A new attempt starts again at `queued`."""

RANK: dict[State, int] = {state: rank for rank, state in enumerate(State)}
"""Larger wins within an attempt. Among ends, success is the truth that cannot be invented: a
gateway that was taken for dead may still finish what the reaper has marked failed."""
