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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.interface import StepInput

_BLOCKS_AT_ONCE = 16  # that are copied to be summed


def all_sampled(step: StepInput) -> bool:
    """Whether the sampler looks at every row."""
    is_decoding = step.samples & (step.lengths == 1 + step.num_drafted)
    return step.num_generated == step.num_chunks and bool(is_decoding.all())


def sound_rows(hidden: Tensor) -> Tensor:
    """Which of the rows `[rows, hidden]` are finite, bool `[rows]`. Does not wait for the device."""
    return torch.isfinite(hidden.sum(-1, dtype=torch.float32))


def spoiled(step: StepInput, first_rows: NDArray[np.int64], is_sound: NDArray[np.bool_]) -> frozenset[int]:
    """The ids of sequences of which a row is not sound; what was drafted may yet be rejected. `first_rows`
    of each chunk, in `is_sound` `[rows]`."""
    ends = first_rows + step.lengths - step.num_drafted
    return frozenset(
        int(sequence_id)
        for sequence_id, row, end in zip(step.sequence_ids, first_rows, ends, strict=True)
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


def finite_blocks(blocks: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Which of `blocks`, int64 `[blocks]`, have keys, values and scales that are all finite, as their sum in
    each of `parts` (as in `KVCache`) is then, too; bool `[blocks]`. Does not wait for the device."""
    some = torch.split(blocks, _BLOCKS_AT_ONCE)
    sums = [torch.cat([_sums(part, ids) for ids in some]) for part in parts]
    return torch.isfinite(torch.stack(sums)).all(0)


def _sums(part: Tensor, blocks: Tensor) -> Tensor:
    if part.dtype.itemsize == 1:  # not every device selects, or adds, elements of 8 bits
        rows = part.view(torch.uint8).index_select(0, blocks).view(part.dtype).float()
    else:
        rows = part.index_select(0, blocks)
    return rows.sum(-1, dtype=torch.float32)


def infinite(blocks: Mapping[int, Sequence[int]], is_finite: Sequence[bool]) -> frozenset[int]:
    """The ids of sequences of which a block is not finite; `is_finite` of all blocks, in order."""
    owners = [name for name, ids in blocks.items() for _ in ids]
    return frozenset(name for name, sound in zip(owners, is_finite, strict=True) if not sound)
