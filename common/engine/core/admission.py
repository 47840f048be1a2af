"""The line for slots and blocks: sequences that wait here, and prompts that another node computes.

Owns: the place in line of the prompts on their way, the room that is held for them, and the rule by
which room is taken. Knows nothing of steps, of running sequences or of how a prompt comes here.

    sequence added, or preempted ──▶ waiting ───┐ its turn, and room for all it knows ──▶ running
    prompt offered by another node ▶ expected ──┘ its turn, and room ──▶ held ──▶ running (adopted)
                                                                           └────▶ released

Nobody overtakes: whoever is first in line (by priority, then by arrival) and does not fit holds up
the others, so that a large prompt is not passed by small ones for ever, nor a preempted sequence by
prompts that keep coming. Of the prompts on their way only the first one stands in this line; which
one that is, their owner knows.

Held room, slot and blocks, is nobody else's until the prompt's sequence takes it or it is released.
It cannot be preempted, so it is given only while a block is left for each sequence that has a slot:
no grant stops those who run at once. And it ends without waiting for anybody in this line, by the
sender's word or the loss of its link, so that a running sequence that lacks a block goes on then.
"""

from __future__ import annotations

import collections.abc
import dataclasses

from common.engine.core.block_pool import BlockPool


@dataclasses.dataclass(slots=True, eq=False)
class ExpectedPrompt:
    """A prompt of `num_positions` that another node computes, as it stands in line."""

    order: tuple[int, int, int]  # as `Sequence.order`: smaller is more important
    block_hashes: collections.abc.Sequence[bytes]  # of blocks that may be here already
    num_positions: int
    found: int = 0  # how many were here when there was no room for it
    refused_at: tuple[int, int] | None = None  # free blocks and headroom then


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Room:
    """A slot, and all blocks of one prompt with a reference each; the first `num_cached` of them
    hold their content already."""

    blocks: list[int]
    num_cached: int


class Admission:
    """`expected` is the first in line of the prompts on their way; `held` is the room of those whose
    turn has come."""

    def __init__(self, pool: BlockPool) -> None:
        self.expected: ExpectedPrompt | None = None
        self.held: set[Room] = set()
        self._pool = pool

    def goes_before(self, order: tuple[int, int, int]) -> bool:
        """Whether the expected prompt stands in line before `order`."""
        return self.expected is not None and self.expected.order < order

    def hold(self, prompt: ExpectedPrompt, headroom: int) -> Room | None:
        """Room for a prompt, if `headroom` blocks are left then; None: not now. Asked again while
        nothing has changed, it does not look again."""
        pool = self._pool
        state = (pool.num_free, headroom)
        following = prompt.block_hashes[prompt.found : prompt.found + 1]
        if prompt.refused_at == state and not pool.lookup(following):
            return None
        count = pool.blocks_for(prompt.num_positions)
        if not pool.has_room(prompt.block_hashes, count, headroom):
            prompt.found, prompt.refused_at = len(pool.lookup(prompt.block_hashes)), state
            return None
        cached = pool.match(prompt.block_hashes)
        room = Room(cached + pool.allocate(count - len(cached)), len(cached))
        self.held.add(room)
        return room
