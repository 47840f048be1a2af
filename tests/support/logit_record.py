"""Records the logits of every position that an engine computes, however its steps are batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence

import torch
from torch import Tensor

from common.engine import Engine, SamplingParams, StepOutput
from common.engine.core.sequence import Sequence
from common.engine.devices.rows import Rows
from common.engine.speculation import HostProposer


@dataclasses.dataclass
class Run:
    """What a regime computed: per request its tokens, and per position every logits row seen."""

    tokens: dict[str, list[int]]
    logits: dict[tuple[str, int], list[Tensor]]  # (request, position) → [vocab] each
    num_rows: int
    num_preemptions: int


class RandomProposer(HostProposer):
    """Drafts of random length, right for a random stretch where the true continuation is known."""

    def __init__(self, truth: dict[str, list[int]], vocab_size: int, seed: int) -> None:
        self._truth, self._vocab_size = truth, vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def _number(self, below: int) -> int:
        return int(torch.randint(0, below, (1,), generator=self._generator))

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        for sequence in sequences:
            known = len(sequence.token_ids)
            drafts = self._truth[sequence.request_id][known : known + self._number(7)]
            if drafts and self._number(2):
                drafts[self._number(len(drafts))] = self._number(self._vocab_size)
            sequence.draft_token_ids = drafts


def run_recorded(
    engine: Engine, prompts: dict[str, list[int]], params: dict[str, SamplingParams], order: list[str]
) -> Run:
    """Add the requests in `order`, run to the end, keep the logits of all accepted positions."""
    tokens = {name: list(prompts[name]) for name in order}
    rows_seen: list[tuple[str, int, tuple[int, ...], Tensor]] = []
    original = engine.runner.model.forward

    def forward(rows: Rows, cache: object) -> Tensor:
        hidden = original(rows, cache)  # type: ignore[arg-type]
        (step,) = engine.scheduler._steps
        row = 0
        for chunk in step.chunks:
            if chunk.is_prompt and row < rows.padded_generated:
                row = rows.padded_generated
            logits = engine.runner.model.logits(hidden[row : row + chunk.length])
            first_draft = chunk.end - chunk.num_drafted
            for index in range(chunk.length):
                position = chunk.start + index
                drafted = tuple(chunk.sequence.draft_token_ids[: max(0, position + 1 - first_draft)])
                rows_seen.append((chunk.sequence.request_id, position, drafted, logits[index]))
            row += chunk.length
        return hidden

    engine.runner.model.forward = forward  # type: ignore[method-assign, assignment]
    try:
        for name in order:
            engine.add_prompt(name, prompts[name], params[name])
        outputs: list[StepOutput] = []
        while engine.has_work:
            outputs += engine.step()
    finally:
        engine.runner.model.forward = original  # type: ignore[method-assign]
    for output in outputs:
        assert output.error is None
        assert output.position == len(tokens[output.request_id])
        tokens[output.request_id] += output.token_ids
    logits: dict[tuple[str, int], list[Tensor]] = {}
    for name, position, drafted, row_logits in rows_seen:
        final = tokens[name]
        if list(drafted) == final[position + 1 - len(drafted) : position + 1]:
            logits.setdefault((name, position), []).append(row_logits)
    engine.check_idle()
    return Run(tokens, logits, len(rows_seen), engine.scheduler.num_preemptions)
