"""What no graph computes of a step: prompts, or all of it, and what is known of the blocks that it fills.

Two pieces of work for a queue, since blocks are handed over between them: `compute`, then `sample`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.engine.devices.sampling import RowBuffers, Sampled
from common.engine.interface import ScoredChunk
from common.engine.runner.scoring import score_prompts
from common.engine.runner.soundness import finite_blocks, sound_rows
from common.engine.runner.step_arrays import StepArrays
from common.engine.runner.step_layout import PartOnDevice, part_on_device, sampled_on_device
from common.engine.runner.under_way import REST, UnderWay

if TYPE_CHECKING:
    from common.engine.runner.step_program import StepProgram


class RestOfStep:
    def __init__(self, program: StepProgram, under_way: UnderWay, upload: StepArrays) -> None:
        self._program, self._under_way, self._upload = program, under_way, upload
        self._hidden: Tensor | None = None

    @torch.inference_mode()
    def compute(self) -> None:
        program, under_way = self._program, self._under_way
        results = under_way.results
        if under_way.split.rest is not None:
            self._hidden = hidden = program.forward(self._part())
            results.device(program.results, f"{REST}/sound").copy_(sound_rows(hidden))
        if under_way.blocks:
            blocks = self._upload.device(program.given, "blocks")
            finite = finite_blocks(blocks, program.cache.own_parts)
            results.device(program.results, "finite").copy_(finite)

    @torch.inference_mode()
    def sample(self, *, greedy: bool) -> None:
        program, under_way = self._program, self._under_way
        hidden, rest = self._hidden, under_way.split.rest
        assert hidden is not None
        assert rest is not None
        if under_way.step.scored:
            scored = list(self._scored())
            under_way.scored = score_prompts(scored, program.model, program.sampler, rest.batch, hidden)
        part = self._part()
        out = sampled_on_device(under_way.results, program.results, REST)
        for group in under_way.split.groups:
            positions = part.logits[group.first_position : group.end_position]
            rows = slice(group.first_row, group.end_row)
            program.sampling.choose_into(
                program.model.logits(hidden[positions]),
                _rows_of(part.sampled, rows),
                Sampled(*(getattr(out, field.name)[rows] for field in dataclasses.fields(Sampled))),
                greedy=greedy,
            )
        order = self._upload.device(program.given, "order")
        program.last_tokens.index_copy_(0, order, out.tokens)

    def _part(self) -> PartOnDevice:
        rest = self._under_way.split.rest
        assert rest is not None
        rows = rest.batch.rows
        return part_on_device(
            self._upload,
            self._program.given,
            REST,
            rows.num_generated,
            rows.padded_generated,
            rows.num_generated_tiles,
        )

    def _scored(self) -> Iterator[ScoredChunk]:
        """As the part counts its chunks."""
        step, rest = self._under_way.step, self._under_way.split.rest
        assert rest is not None
        before = step.num_chunks - len(rest.batch.first_rows)
        return (dataclasses.replace(scored, chunk=scored.chunk - before) for scored in step.scored)


def _rows_of(rows: RowBuffers, some: slice) -> RowBuffers:
    return RowBuffers(
        slots=rows.slots[some],
        positions=rows.positions[some],
        sources=rows.sources[some],
        draft_start=rows.draft_start[some],
        draft_length=rows.draft_length[some],
        drafted=rows.drafted,
    )
