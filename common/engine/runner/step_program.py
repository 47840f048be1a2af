"""What a device with a queue does in a step, and what comes of it.

    upload → copies of blocks, drafts → generated rows, by their bucket's graph → the rest, call by call
           → [what must be known before blocks are handed over] → results

Generated rows come first: while the device replays their graph, the host gives it the calls of the rest. A
graph has all of it inside, from the tokens that the step before chose to those that it chooses itself; which
tokens these are, the host does not know yet.

Owns the memory on the device that steps share: what they are given, what they give back, the last tokens. All
of it is written and read in the order of one queue, so that two steps may be under way.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from collections.abc import Sequence as AnySequence

import numpy as np
import torch
from torch import Tensor

from common.engine.devices.device import Backend
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.queue import DeviceQueue, Graph, Work
from common.engine.devices.sampling import Changes, StepSampling
from common.engine.interface import DraftInput, DraftReport, StepInput
from common.engine.model.decoder import Model
from common.engine.runner.buckets import Buckets
from common.engine.runner.draft_step import Drafter
from common.engine.runner.rest_of_step import RestOfStep
from common.engine.runner.sampler import Sampler
from common.engine.runner.soundness import filled_blocks, sound_rows
from common.engine.runner.step_arrays import StepArrays
from common.engine.runner.step_layout import (
    PartOnDevice,
    PartSizes,
    Split,
    add_part,
    add_results,
    fill_padding,
    fill_part,
    part_on_device,
    sampled_on_device,
    split,
)
from common.engine.runner.step_memory import StepMemories, StepMemory
from common.engine.runner.under_way import GENERATED, REST, UnderWay

SPARE_BYTES = 1 << 20  # for what sampler slots open with; what is larger gets memory of its own


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of one step."""

    rows: int
    sequences: int
    blocks: int  # of one sequence
    sampled: int  # rows


class StepProgram:
    """For one thread that gives steps."""

    def __init__(
        self,
        model: Model,
        backend: Backend,
        sampler: Sampler,
        sampling: StepSampling,
        queue: DeviceQueue,
        buckets: Buckets,
        limits: Limits,
        draft: Drafter | None = None,
    ) -> None:
        self.queue, self.buckets = queue, buckets
        self.model, self.backend = model, backend
        self.sampler, self.sampling = sampler, sampling
        self._draft = draft
        self._tables = limits.sequences * limits.blocks
        upload, results = self._largest(limits)
        self.given = queue.zeros(upload.end + SPARE_BYTES)
        self.results = queue.zeros(results.end)
        self.last_tokens = queue.zeros(8 * (limits.sampled + buckets.sizes[-1])).view(torch.int64)
        self.memories = StepMemories(queue, upload.end, results.end)
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._last_number = -1  # of the step that gave the last tokens

    cache: KVCache  # set before a step is given

    def _largest(self, limits: Limits) -> tuple[StepArrays, StepArrays]:
        upload, results = StepArrays(), StepArrays()
        bucket = self.buckets.sizes[-1]
        rest = PartSizes(limits.rows, limits.rows, self._tables, limits.rows, limits.sampled, limits.rows)
        add_part(upload, GENERATED, PartSizes.of_bucket(bucket, self._tables))
        add_part(upload, REST, rest)
        upload.add("order", np.int64, limits.sampled)
        upload.add("blocks", np.int64, limits.rows)
        add_results(results, GENERATED, bucket, bucket)
        add_results(results, REST, limits.rows, limits.sampled)
        results.add("finite", np.uint8, limits.rows)
        return upload, results

    # Graphs.

    @property
    def num_graphs(self) -> int:
        """That `record` makes."""
        return 2 * len(self.buckets.sizes)

    def run_bucket(self, padded: int, *, greedy: bool = False) -> None:
        """A step of a bucket without a row, call by call: what compiles kernels and takes memory."""
        upload = self._bucket_upload(padded)
        memory = self.memories.take()
        fill_padding(upload, memory.upload.array, GENERATED)
        end = upload.end
        self.queue.copy(self.given[:end], memory.upload.tensor[:end])
        self.queue.run(functools.partial(self._compute_generated, padded, greedy))
        self.queue.synchronize()
        self.memories.give_back(memory)

    def record(self) -> None:
        """Graphs of all buckets, the largest first, for it leaves the others the most memory to share."""
        for padded in reversed(self.buckets.sizes):
            for greedy in (False, True):
                self.run_bucket(padded, greedy=greedy)
                work = functools.partial(self._compute_generated, padded, greedy)
                self._graphs[padded, greedy] = self.queue.capture(work)

    def rehearse(self, step: StepInput) -> None:
        """Compute a step and drop what comes of it."""
        memory = self.memories.take()
        self.give(step, memory, before_handing_over=True)
        self.queue.synchronize()
        self.memories.give_back(memory)
        self._last_number = -1

    def forget_graphs(self) -> None:
        self._graphs.clear()

    def _bucket_upload(self, padded: int) -> StepArrays:
        arrays = StepArrays()
        add_part(arrays, GENERATED, PartSizes.of_bucket(padded, self._tables))
        return arrays

    @torch.inference_mode()
    def _compute_generated(self, padded: int, greedy: bool) -> None:
        """Recorded: every tensor it begins and ends with lies where it lies in all steps of this bucket."""
        part = part_on_device(self._bucket_upload(padded), self.given, GENERATED, padded, padded, padded)
        results = StepArrays()
        add_results(results, GENERATED, padded, padded)
        hidden = self.forward(part)
        results.device(self.results, f"{GENERATED}/sound").copy_(sound_rows(hidden))
        out = sampled_on_device(results, self.results, GENERATED)
        logits = self.model.logits(hidden[part.logits])
        self.sampling.choose_into(logits, part.sampled, out, greedy=greedy)
        self.last_tokens[:padded].copy_(out.tokens)

    def forward(self, part: PartOnDevice) -> Tensor:
        """A sequence that had a fault ends with that; what is computed of it here counts for nothing."""
        tokens = part.rows.token_ids
        last = self.last_tokens[(-1 - tokens).clamp_min_(0)].clamp_min_(0)
        rows = dataclasses.replace(part.rows, token_ids=torch.where(tokens < 0, last, tokens))
        return self.model.forward(self.backend.prepare(rows), self.cache)

    # A step.

    def give(self, step: StepInput, memory: StepMemory, *, before_handing_over: bool) -> UnderWay:
        """All of it is in the queue when this returns. When it raises, any part may be: `memory` is in use
        until the queue has ended."""
        begun = time.perf_counter()
        with self.queue.here():
            return self._give(step, memory, begun, before_handing_over=before_handing_over)

    def _give(
        self, step: StepInput, memory: StepMemory, begun: float, *, before_handing_over: bool
    ) -> UnderWay:
        queue = self.queue
        self.backend.enter_thread()
        self.sampler.change(step.slots)
        if step.slots.reset:
            self.sampling.resend()
        if step.copies:
            queue.run(functools.partial(self.cache.copy_blocks, step.copies))
        drafted = None
        if step.drafts is not None:
            step, drafted = self._drafted(step, step.drafts)
        if (step.token_ids < 0).any() and self._last_number != step.number - 1:
            raise RuntimeError("the step that this one goes on from was not computed")
        layout = self.cache.layout
        parts = split(step, layout.block_size, self.backend.row_plan, self.buckets, self.sampling.most_rows)
        blocks = filled_blocks(step, layout.block_size)
        records = self.sampler.table.records[step.sampled.slots]
        most = int(records["logprobs"].max(initial=-1))
        greedy = most < 0 and not (records["edited"].any() or records["temperature"].any())
        results = _results_of(parts, blocks)
        under_way = UnderWay(step, memory, parts, results, blocks, most, drafted, begun)
        upload, words = self._upload(under_way, self.sampling.changes(self.sampler.table))
        if words is not None:
            queue.run(words)
        if parts.generated is not None:
            self._give_generated(parts.generated.padded, greedy=greedy)
        rest = RestOfStep(self, under_way, upload)
        if parts.rest is not None or blocks:
            queue.run(rest.compute)
        end = results.end
        memory.filled.reserve(end)
        memory.results.reserve(end)
        if before_handing_over:
            queue.copy(memory.filled.tensor[:end], self.results[:end])
            under_way.filled = queue.record()
        if parts.rest is not None:
            queue.run(functools.partial(rest.sample, greedy=greedy))
        queue.copy(memory.results.tensor[:end], self.results[:end])
        under_way.done = queue.record()
        if len(step.sampled.slots):
            self._last_number = step.number
        return under_way

    def _give_generated(self, padded: int, *, greedy: bool) -> None:
        graph = self._graphs.get((padded, greedy))
        if graph is not None:
            self.queue.replay(graph)
        else:
            self.queue.run(functools.partial(self._compute_generated, padded, greedy))

    def _drafted(self, step: StepInput, wanted: DraftInput) -> tuple[StepInput, DraftReport]:
        """The host waits: it verifies what was guessed. Nothing is under way before a step with drafts."""
        assert self._draft is not None
        found: list[tuple[StepInput, DraftReport]] = []
        run = functools.partial(self._draft.run, step, wanted, self.cache, self.sampler)
        self.queue.run(lambda: found.append(run()))
        self.queue.synchronize()
        return found[0]

    def _upload(self, under_way: UnderWay, changes: Changes) -> tuple[StepArrays, Work | None]:
        """Copy all arrays of a step to the device; and what takes in the sampler's changes there."""
        parts, pinned, arrays = under_way.split, under_way.memory.upload, StepArrays()
        if parts.generated is not None:
            tables = len(parts.generated.batch.rows.tables)
            add_part(arrays, GENERATED, PartSizes.of_bucket(parts.generated.padded, tables))
        if parts.rest is not None:
            add_part(arrays, REST, PartSizes.of(parts.rest))
        blocks = [block for ids in under_way.blocks.values() for block in ids]
        arrays.add("order", np.int64, len(parts.order))
        arrays.add("blocks", np.int64, len(blocks))
        own = arrays.end
        arrays.add("changes", np.int64, len(changes.words))
        pinned.reserve(arrays.end)
        memory = pinned.array
        if parts.generated is not None:
            fill_part(arrays, memory, GENERATED, parts.generated)
        if parts.rest is not None:
            fill_part(arrays, memory, REST, parts.rest)
        arrays.fill(memory, "order", parts.order)
        arrays.fill(memory, "blocks", np.array(blocks, np.int64))
        arrays.fill(memory, "changes", changes.words)
        given, end = self.given, arrays.end
        if end > len(given):  # a prompt whose tokens are counted, say
            given, end = self.queue.zeros(end), own
            self.queue.copy(given, pinned.tensor[: len(given)])
        self.queue.copy(self.given[:end], pinned.tensor[:end])
        if not len(changes.words):
            return arrays, None
        words = arrays.device(given, "changes")
        return arrays, functools.partial(self.sampling.apply, words, changes)


def _results_of(parts: Split, blocks: Mapping[int, AnySequence[int]]) -> StepArrays:
    arrays = StepArrays()
    if parts.generated is not None:
        add_results(arrays, GENERATED, parts.generated.padded, parts.generated.padded)
    if parts.rest is not None:
        add_results(arrays, REST, parts.rest.padded, len(parts.rest.rows.slots))
    arrays.add("finite", np.uint8, sum(map(len, blocks.values())))
    return arrays
