"""The largest step that a core may plan, made up: what is compiled and allocated for it, is for all others.

As many prompts at once as have all their logits computed in one call, together as long as a step may be, each
sampled. All of them lie in one block, which holds nothing of worth.
"""

from __future__ import annotations

import numpy as np

from common.engine.interface import SlotChanges, SlotOpening, StepInput
from common.engine.sampling.records import SampleRows
from common.sampling import SamplingParams

_NOTHING = np.empty(0, np.int64)


def largest_step(tokens: int, prompts: int, max_model_len: int, block_size: int) -> StepInput:
    """Of `tokens` rows in `prompts` prompts or more, if these would be too long."""
    prompts = min(tokens, max(prompts, -(-tokens // max_model_len)))
    lengths = np.full(prompts, tokens // prompts, np.int64)
    lengths[: tokens % prompts] += 1
    each = np.arange(prompts)
    params = SamplingParams(max_tokens=1)
    openings = tuple(
        SlotOpening(slot, params, 0, (), int(lengths[slot]), _NOTHING, _NOTHING) for slot in range(prompts)
    )
    return StepInput(
        number=0,
        copies=(),
        slots=SlotChanges(reset=True, closed=(), opened=openings),
        sequence_ids=each,
        num_generated=0,
        starts=np.zeros(prompts, np.int64),
        lengths=lengths,
        num_drafted=np.zeros(prompts, np.int64),
        samples=np.ones(prompts, np.bool_),
        token_ids=np.zeros(tokens, np.int64),
        generated_tables=np.zeros((0, 0), np.int32),
        prompt_tables=np.zeros((prompts, -(-int(lengths[0]) // block_size)), np.int32),
        sampled=SampleRows(
            slots=each,
            positions=lengths,
            drafted=_NOTHING,
            draft_start=np.zeros(prompts, np.int64),
            draft_length=np.zeros(prompts, np.int64),
            sources=each,
        ),
        scored=(),
    )


NO_SLOTS = SlotChanges(reset=True, closed=(), opened=())
