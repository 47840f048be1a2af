"""The engine's device side: a model and its KV pool, and one step after the other of what it is told.

Owns the sampler's state, and the order of a step's parts. Knows nothing of requests, of who holds which
block, or of why a step is as it is: everything comes in a `StepInput`. For devices that have computed when
a call returns; queue_runner.py is for others.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.device import Device
from common.engine.interface import Filled, StepInput, StepResult, num_sampler_slots
from common.engine.runner import loading
from common.engine.runner.batch import Batch, lay_out
from common.engine.runner.loaded_model import LoadedModel, Storage
from common.engine.runner.sampler import Sampler
from common.engine.runner.scoring import score_prompts
from common.engine.runner.soundness import (
    all_sampled,
    filled_blocks,
    finite_blocks,
    infinite,
    sound_rows,
    spoiled,
)
from common.settings.config import EngineSettings


class ModelRunner(LoadedModel):
    """Implements `Runner`: `submit` computes at once, in the thread that calls it."""

    def __init__(
        self, settings: EngineSettings, *, storage: Storage | None = None, device: Device | None = None
    ) -> None:
        """As `LoadedModel`, with a pool from `storage` where that is to be shared with other processes."""
        super().__init__(settings, device)
        seqs = self.limits.max_num_seqs
        self.open_pool(
            loading.pool_size(settings, self.layout, self.max_model_len, seqs, self.device), storage
        )
        vocab_size = self.config.vocab_size
        self.sampler = Sampler(vocab_size, num_sampler_slots(seqs), self.device.sampling(vocab_size))
        self._failed = False  # the last step
        self._spoiled_ids: frozenset[int] = frozenset()  # of the last step
        self._last: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # its number, its tokens

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.run(step, filled))
        except BaseException as error:
            future.set_exception(error)
        return future

    def run(self, step: StepInput, filled: Filled | None = None) -> StepResult:
        """Copies, drafts, forward, logits, sampling. A step that was planned to follow one that failed is
        refused: what it would go on from is unknown."""
        if self._failed and not step.slots.reset:
            raise RuntimeError("the step before this one failed")
        self._failed, begun = True, time.perf_counter()
        result = self._run(step, filled)
        self._failed = False
        return dataclasses.replace(result, seconds=time.perf_counter() - begun)

    def _run(self, step: StepInput, filled: Filled | None) -> StepResult:
        self.backend.enter_thread()
        self.sampler.change(step.slots)
        self.cache.copy_blocks(step.copies)
        drafted = None
        if step.drafts is not None:
            assert self.draft is not None
            step, drafted = self.draft.run(step, step.drafts, self.cache, self.sampler)
        step = self._resolved(step)
        num_sampled = np.where(step.samples, 1 + step.num_drafted, 0)
        batch = lay_out(step, num_sampled, self.facts.layout.block_size, self.backend.row_plan)
        hidden = self.model.forward(self.backend.prepare(batch.rows), self.cache)
        sound = None if all_sampled(step) else sound_rows(hidden)
        ids: frozenset[int] | None = None
        if filled is not None:
            self.device.synchronize()
            ids = self._spoiled(step, batch, sound)
            filled(ids)
        scored = score_prompts(step.scored, self.model, self.sampler, batch, hidden)
        sampled, accepted = None, np.empty(0, np.int64)
        if len(batch.sampled):
            states = hidden[torch.from_numpy(batch.sampled).to(hidden.device)]
            sampled = self.sampler.sample(self.model.logits(states), step.sampled)
            accepted = self.sampler.accept(step.sampled, sampled)
            self._last = step.number, sampled.token_ids
        self.device.synchronize()  # a step that samples nothing has not waited for anything
        if ids is None:
            ids = self._spoiled(step, batch, sound)
        return StepResult(sampled, accepted, scored, ids, drafts=drafted)

    def is_lost(self, error: BaseException, /) -> bool:
        return self.device.is_lost(error)

    def close(self, within_s: float | None = None) -> None:
        """Nothing is under way; memory goes with the object."""

    def _resolved(self, step: StepInput) -> StepInput:
        """A step with the tokens of the step before where they were not known when it was planned. A
        sequence that had a fault ends with that; what is computed of it here counts for nothing."""
        unknown = step.token_ids < 0
        if not unknown.any():
            return step
        number, sampled = self._last
        if number != step.number - 1:
            raise RuntimeError("the step that this one goes on from was not computed")
        tokens = step.token_ids.copy()
        tokens[unknown] = np.maximum(sampled[-1 - tokens[unknown]], 0)
        return dataclasses.replace(step, token_ids=tokens)

    def _spoiled(self, step: StepInput, batch: Batch, sound: Tensor | None) -> frozenset[int]:
        """Those that go on from what the step before spoiled, too: its result was not known yet."""
        blocks = filled_blocks(step, self.facts.layout.block_size)
        found = self._spoiled_ids.intersection(step.sequence_ids.tolist())
        if sound is not None:
            found |= spoiled(step, batch.first_rows, sound.cpu().numpy())
        if blocks:
            flat = torch.tensor([block for ids in blocks.values() for block in ids])
            flat = flat.to(self.cache.slabs.device)
            found |= infinite(blocks, finite_blocks(flat, self.cache.own_parts).tolist())
        self._spoiled_ids = found
        return found
