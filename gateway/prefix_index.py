"""Which node holds which blocks, as far as their events have told.

Owns: a set of block hashes per node, kept in step with the node by numbered events, and the
question the router asks: how many leading blocks of this chain does each node hold? It is a hint:
a wrong answer costs time, never correctness.

Events of a node are numbered from 1 without gaps. An event whose number was seen is dropped; one
beyond the next number is a gap: it waits, and the node is asked for a snapshot (`wants_snapshot`).
A snapshot numbered N replaces the node's set and stands for all events up to N; those that waited
beyond it follow. Any number of gateways that see the events in any order end with the same index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from common.wire.messages import CacheEvents

MOST_WAITING = 1024  # events kept behind a gap; a snapshot stands for the rest


@dataclasses.dataclass(slots=True)
class _Node:
    number: int = 0
    blocks: set[bytes] = dataclasses.field(default_factory=set)
    waiting: dict[int, CacheEvents] = dataclasses.field(default_factory=dict)


class PrefixIndex:
    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._holders: dict[bytes, set[str]] = {}

    def apply(self, event: CacheEvents) -> None:
        node = event.node
        state = self._nodes.setdefault(node, _Node())
        if event.number <= state.number:
            return
        if len(state.waiting) < MOST_WAITING:
            state.waiting[event.number] = event
        self._follow(node, state)

    def load_snapshot(self, node: str, number: int, blocks: Iterable[bytes]) -> None:
        state = self._nodes.setdefault(node, _Node())
        if number < state.number:
            return  # late: events have gone on since
        wanted = set(blocks)
        self._remove(node, state, state.blocks - wanted)
        self._add(node, state, wanted - state.blocks)
        state.number = number
        state.waiting = {n: event for n, event in state.waiting.items() if n > number}
        self._follow(node, state)

    def wants_snapshot(self, node: str) -> bool:
        """True while a gap is open: events wait that cannot be applied."""
        state = self._nodes.get(node)
        return state is not None and bool(state.waiting)

    def forget(self, node: str) -> None:
        """The incarnation is gone, and its cache with it."""
        state = self._nodes.pop(node, None)
        if state is not None:
            self._remove(node, state, set(state.blocks))

    def leading_blocks(self, chain: Sequence[bytes]) -> dict[str, int]:
        """For each node that holds the first block of `chain`: how many it holds in a row."""
        counts: dict[str, int] = {}
        alive: set[str] | None = None
        for length, block in enumerate(chain, start=1):
            holders = self._holders.get(block, set())
            alive = set(holders) if alive is None else alive & holders
            if not alive:
                break
            counts.update(dict.fromkeys(alive, length))
        return counts

    def blocks(self, node: str) -> frozenset[bytes]:
        state = self._nodes.get(node)
        return frozenset() if state is None else frozenset(state.blocks)

    @property
    def size(self) -> int:
        """Distinct blocks known; 0 when every node was forgotten."""
        return len(self._holders)

    def _follow(self, node: str, state: _Node) -> None:
        while (event := state.waiting.pop(state.number + 1, None)) is not None:
            self._remove(node, state, set(event.evicted))
            self._add(node, state, set(event.stored))
            state.number = event.number

    def _add(self, node: str, state: _Node, blocks: set[bytes]) -> None:
        state.blocks |= blocks
        for block in blocks:
            self._holders.setdefault(block, set()).add(node)

    def _remove(self, node: str, state: _Node, blocks: set[bytes]) -> None:
        for block in blocks & state.blocks:
            holders = self._holders[block]
            holders.discard(node)
            if not holders:
                del self._holders[block]
        state.blocks -= blocks
