"""A runner for a device that computes while the host goes on: a step is given, and its result comes later.

Whoever submits gives the step to the device and goes on at once; a thread of the runner's own waits for the
device (step_waiter.py). So the next step is given while one is computed, and no event loop ever waits.

Owns the order of loading: weights, what a step needs, the pool, graphs (pool_plan.py). Nobody else may use
the device before they are recorded.
"""

from __future__ import annotations

import functools
import weakref
from concurrent.futures import Future

from common.engine.devices.device import Device
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.queue import DeviceQueue
from common.engine.interface import Filled, StepInput, StepResult, num_sampler_slots
from common.engine.runner import loading
from common.engine.runner.buckets import Buckets
from common.engine.runner.largest_step import NO_SLOTS, largest_step
from common.engine.runner.loaded_model import LoadedModel, Storage
from common.engine.runner.pool_plan import Needs, blocks_of_pool
from common.engine.runner.sampler import Sampler
from common.engine.runner.step_program import Limits, StepProgram
from common.engine.runner.step_waiter import Given, Run, StepWaiter
from common.errors import EngineBroken
from common.settings.config import EngineSettings


class QueueRunner(LoadedModel):
    """Implements `Runner`. `submit` is called by one thread."""

    def __init__(
        self, settings: EngineSettings, device: Device, queue: DeviceQueue, *, storage: Storage | None = None
    ) -> None:
        """As `LoadedModel`, with a pool from `storage` where that is to be shared with other processes."""
        super().__init__(settings, device)
        device.synchronize()  # weights came by another queue
        self._queue = queue
        with queue.here():
            self._program = self._prepared(settings, queue, storage)
        self._run = Run()
        self._waiter = StepWaiter(queue, self._program.memories)
        weakref.finalize(self, self._waiter.stop)  # for who has no use for `close`

    def _prepared(self, settings: EngineSettings, queue: DeviceQueue, storage: Storage | None) -> StepProgram:
        vocab_size, slots = self.config.vocab_size, num_sampler_slots(self.limits.max_num_seqs)
        sampling = self.device.step_sampling(vocab_size)
        sampling.bind(slots)
        self.sampler = Sampler(vocab_size, slots, sampling, counts=False)
        program = StepProgram(
            self.model,
            self.backend,
            self.sampler,
            sampling,
            queue,
            self._buckets(sampling.most_rows),
            self._limits(slots),
            self.draft,
        )
        blocks = self._measured_blocks(program, sampling.most_rows, shared=storage is not None)
        self.open_pool(blocks, storage)
        program.cache = self.cache
        if not settings.enforce_eager:
            program.record()
        return program

    def _buckets(self, most_rows: int) -> Buckets:
        drafted = self.settings.most_drafted if self.settings.speculative != "off" else 0
        most = min(self.limits.max_num_batched_tokens, most_rows)
        multiple = self.backend.row_plan.generated_multiple
        return Buckets.up_to(self.limits.max_num_seqs, 1 + drafted, most, multiple)

    def _limits(self, slots: int) -> Limits:
        plan, tokens = self.backend.row_plan, self.limits.max_num_batched_tokens
        return Limits(
            rows=plan.padded_generated(tokens) + plan.padded_prompt(tokens),
            sequences=self.limits.max_num_seqs,
            blocks=-(-self.max_model_len // self.settings.block_size),
            sampled=slots,
        )

    def _measured_blocks(self, program: StepProgram, most_sampled: int, *, shared: bool) -> int:
        """How many the pool gets, once the largest steps have run in a pool of one."""
        settings, tokens = self.settings, self.limits.max_num_batched_tokens
        memory = self.device.pool(1, self.layout.slab_bytes)
        program.cache = KVCache(self.layout, 1, memory)
        prompts = min(self.limits.max_num_seqs, most_sampled)
        step = largest_step(tokens, prompts, self.max_model_len, settings.block_size)
        bucket = self._queue.peak_of(functools.partial(program.run_bucket, program.buckets.sizes[-1]))
        steps = self._queue.peak_of(functools.partial(program.rehearse, step))
        self.sampler.change(NO_SLOTS)
        needs = Needs(
            weights=loading.weight_count(self.config) * self.backend.dtype.itemsize,
            steps=max(bucket, steps),
            bucket=bucket,
            graphs=0 if settings.enforce_eager else program.num_graphs,
            shared=shared,
        )
        useful = self.limits.max_num_seqs * -(-self.max_model_len // settings.block_size)
        left = self.device.free_memory()
        return blocks_of_pool(settings, left, needs, self.layout.slab_bytes, useful)

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        """A step that was planned to follow one that failed is refused: what it goes on from is unknown."""
        future: Future[StepResult] = Future()
        future.set_running_or_notify_cancel()  # nobody can take it from the thread that resolves it
        if step.slots.reset:
            self._run = Run()
        run, memory = self._run, None
        try:
            if run.refuses:
                raise RuntimeError("the step before this one failed")
            memory = self._program.memories.take()
            under_way = self._program.give(step, memory, before_handing_over=filled is not None)
        except BaseException as error:
            run.refuses = True
            self._waiter.put(Given(run, future, filled, memory, error=error))
        else:
            self._waiter.put(Given(run, future, filled, memory, under_way))
        return future

    def is_lost(self, error: BaseException, /) -> bool:
        return self.device.is_lost(error)

    def close(self, within_s: float | None = None) -> None:
        self._waiter.stop()
        if not self._waiter.join(within_s):
            raise EngineBroken(f"a step under way did not end within {within_s:g} s")
        self._program.forget_graphs()
