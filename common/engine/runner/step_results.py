"""What came of a step, read on the host once the device has brought it.

Owns what one step has to know of the one before: whose KV is spoiled. For one thread, step after step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.engine.interface import StepResult
from common.engine.runner.sampler import accepted
from common.engine.runner.soundness import all_sampled, infinite, spoiled
from common.engine.runner.step_memory import Pinned
from common.engine.runner.under_way import GENERATED, REST, UnderWay
from common.engine.sampling.records import Logprobs, SampleOutput


class StepResults:
    def __init__(self) -> None:
        self._spoiled_ids: frozenset[int] = frozenset()  # of the last step
        self._read_at = 0.0  # when the last step had ended

    def spoiled(self, under_way: UnderWay, memory: Pinned) -> frozenset[int]:
        """As `StepResult.spoiled`, from either of the step's memories. Once a step."""
        step, arrays = under_way.step, under_way.results
        parts = under_way.split.generated, under_way.split.rest
        found = self._spoiled_ids.intersection(step.sequence_ids.tolist())
        if not all_sampled(step):
            rows, firsts, border = [], [], 0
            for name, part in zip((GENERATED, REST), parts, strict=True):
                if part is not None:
                    rows.append(arrays.host(memory.array, f"{name}/sound"))
                    firsts.append(part.batch.first_rows + border)
                    border += part.padded
            found |= spoiled(step, np.concatenate(firsts), np.concatenate(rows).astype(np.bool_))
        if under_way.blocks:
            found |= infinite(under_way.blocks, arrays.host(memory.array, "finite").tolist())
        self._spoiled_ids = found
        return found

    def result(self, under_way: UnderWay, ids: frozenset[int] | None) -> StepResult:
        """Of a step that is done. `ids`: what `spoiled` said of it, if it was asked."""
        step, memory = under_way.step, under_way.memory.results
        if ids is None:
            ids = self.spoiled(under_way, memory)
        sampled, kept = None, np.empty(0, np.int64)
        if len(step.sampled.slots):
            sampled = self._sampled(under_way)
            kept, _ = accepted(step.sampled, sampled)
        now = time.perf_counter()
        seconds, self._read_at = now - max(under_way.begun, self._read_at), now
        return StepResult(
            sampled, kept, under_way.scored or ((),) * len(step.scored), ids, seconds, under_way.drafted
        )

    def forget(self) -> None:
        """The steps from here on have nothing to do with those before."""
        self._spoiled_ids = frozenset()

    def _sampled(self, under_way: UnderWay) -> SampleOutput:
        logprobs = None
        if under_way.most_logprobs >= 0:
            most = under_way.most_logprobs
            logprobs = Logprobs(
                chosen=self._rows(under_way, "chosen"),
                ranks=self._rows(under_way, "ranks"),
                top_ids=self._rows(under_way, "top_ids")[:, :most],
                top=self._rows(under_way, "top")[:, :most],
            )
        return SampleOutput(self._rows(under_way, "tokens"), self._rows(under_way, "faults"), logprobs)

    def _rows(self, under_way: UnderWay, field: str) -> NDArray[Any]:
        """In the order of the step's sampled rows, as a copy: the memory is the next step's."""
        parts, arrays, memory = under_way.split, under_way.results, under_way.memory.results.array
        count = parts.num_generated_rows
        found = []
        if parts.generated is not None:
            found.append(arrays.host(memory, f"{GENERATED}/{field}")[:count])
        if parts.rest is not None:
            in_order = np.empty_like(rest := arrays.host(memory, f"{REST}/{field}"))
            in_order[parts.order - count] = rest
            found.append(in_order)
        return np.concatenate(found)
