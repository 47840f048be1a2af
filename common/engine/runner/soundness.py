"""Whether a step's KV may be used: a position that came out as NaN or infinity spoils its sequence.

Owns the check of the rows that nobody samples. KV of such a position is NaN or infinity in all layers
but the first few, and so is whatever reads it: a block of it must reach neither the prefix cache nor
another node. Rows that are sampled are looked at by the sampler, too, at no cost: the rows of a step
that only decodes are not looked at here. What is infinite in a key alone, and is given no weight by
any of the rows of its step, shows in no row: hence every block is looked at itself when it is full,
in all layers, before anybody else may find it. A block that a drafted token fills is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.engine.interface import StepInput
from common.engine.runner.batch import Batch


def sound_rows(step: StepInput, hidden: Tensor) -> Tensor | None:
    """Which of the rows `[rows, hidden]` are finite, bool `[rows]`; None where the sampler looks at
    every one. Does not wait for the device."""
    is_decoding = step.samples & (step.lengths == 1 + step.num_drafted)
    if step.num_generated == step.num_chunks and is_decoding.all():
        return None
    return torch.isfinite(hidden.sum(-1, dtype=torch.float32))


def spoiled(step: StepInput, batch: Batch, sound: Tensor | None) -> frozenset[int]:
    """The ids of sequences of which a row is not sound; what was drafted may yet be rejected."""
    if sound is None:
        return frozenset()
    is_sound = sound.cpu().numpy()
    ends = batch.first_rows + step.lengths - step.num_drafted
    return frozenset(
        int(sequence_id)
        for sequence_id, row, end in zip(step.sequence_ids, batch.first_rows, ends, strict=True)
        if not is_sound[row:end].all()
    )


def filled_blocks(step: StepInput, block_size: int) -> dict[int, list[int]]:
    """By id of their sequence, the blocks that a step fills to their end."""
    firsts = (step.starts // block_size).tolist()
    ends = ((step.starts + step.lengths - step.num_drafted) // block_size).tolist()
    return {
        int(step.sequence_ids[chunk]): step.blocks(chunk, first, end)
        for chunk, (first, end) in enumerate(zip(firsts, ends, strict=True))
        if first < end
    }


def infinite(blocks: Mapping[int, Sequence[int]], elements: Tensor) -> frozenset[int]:
    """The ids of sequences of which a block, of `elements` `[num_blocks, elements of a slab]`, has a
    key or value that is not finite: then its sum is not, either."""
    if not blocks:
        return frozenset()
    owners = [name for name, ids in blocks.items() for _ in ids]
    sums = [elements[block].sum(dtype=torch.float32) for ids in blocks.values() for block in ids]
    is_finite = torch.isfinite(torch.stack(sums)).tolist()
    return frozenset(name for name, sound in zip(owners, is_finite, strict=True) if not sound)
