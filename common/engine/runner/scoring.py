"""Log probabilities of a prompt's own tokens, for those who ask for them: rare, and so not in a hurry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from common.engine.interface import ScoredChunk
from common.engine.model.decoder import Model
from common.engine.runner.batch import Batch
from common.engine.runner.sampler import Sampler
from common.engine.sampling.records import TokenLogprob

SCORED_AT_ONCE = 64  # positions of a prompt: their logits are large


def score_prompts(
    chunks: Sequence[ScoredChunk], model: Model, sampler: Sampler, batch: Batch, hidden: Tensor
) -> tuple[tuple[TokenLogprob, ...], ...]:
    """Of `hidden`, the rows of `batch`. Waits for the device."""
    scored = []
    for chunk in chunks:
        row, entries = batch.first_rows[chunk.chunk], []
        for begin in range(0, len(chunk.targets), SCORED_AT_ONCE):
            part = chunk.targets[begin : begin + SCORED_AT_ONCE]
            logits = model.logits(hidden[row + begin : row + begin + len(part)])
            found, _ = sampler.logprobs(logits, part, np.full(len(part), chunk.top))
            entries += [TokenLogprob.of(found, i, chunk.top) for i in range(len(part))]
        scored.append(tuple(entries))
    return tuple(scored)
