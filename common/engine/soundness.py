"""Whether a step's KV may be used: a position that came out as NaN or infinity spoils its sequence.

Owns the check of the rows that nobody samples. KV of such a position is NaN or infinity in all layers
but the first few, and so is whatever reads it: a block of it must reach neither the prefix cache nor
another node. Rows that are sampled are looked at by the sampler, too, at no cost: a step that only
decodes is not looked at here. What is infinite in a key alone, and is given no weight by any of the
rows of its step, passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.batch import Batch
from common.engine.step import Step


def sound_rows(step: Step, hidden: Tensor) -> Tensor | None:
    """Which of the rows `[rows, hidden]` are finite, bool `[rows]`; None where the sampler looks at
    every one. Does not wait for the device."""
    if all(
        not chunk.is_prompt and chunk.samples and chunk.length == 1 + chunk.num_drafted
        for chunk in step.chunks
    ):
        return None
    return torch.isfinite(hidden.sum(-1, dtype=torch.float32))


def spoiled(step: Step, batch: Batch, sound: Tensor | None) -> frozenset[int]:
    """The ids of sequences of which a row is not sound; what was drafted may yet be rejected."""
    if sound is None:
        return frozenset()
    is_sound = sound.cpu().numpy()
    return frozenset(
        chunk.sequence.sequence_id
        for chunk, row in zip(step.chunks, batch.first_rows, strict=True)
        if not is_sound[row : row + chunk.length - chunk.num_drafted].all()
    )
