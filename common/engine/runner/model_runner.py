"""The engine's device side: a model and its KV pool, and one step after the other of what it is told.

Owns weights, KV memory, the sampler's state, and the order of a step's parts. Knows nothing of requests,
of who holds which block, or of why a step is as it is: everything comes in a `StepInput`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.choice import choose_device
from common.engine.devices.kv_cache import KVCache
from common.engine.interface import EngineFacts, Filled, StepInput, StepResult, num_sampler_slots
from common.engine.runner import loading
from common.engine.runner.batch import Batch, lay_out
from common.engine.runner.draft_model import DraftModel
from common.engine.runner.draft_step import Drafter, Target
from common.engine.runner.reencoding_draft import ReencodingDraftModel
from common.engine.runner.sampler import Sampler
from common.engine.runner.soundness import filled_blocks, infinite, sound_rows, spoiled
from common.engine.sampling.records import TokenLogprob
from common.kv_layout import Fingerprint
from common.model_files import model_name, model_revision, resolve_model
from common.model_folder.config_fields import unknown_fields
from common.model_folder.description import describe_model, parse_overrides, read_config
from common.model_folder.model_config import parse_model_config
from common.settings.config import EngineSettings

SCORED_AT_ONCE = 64  # positions of a prompt: their logits are large

Storage = Callable[[torch.device, int, int], Tensor]
"""From the device that a pool must lie on, its number of blocks and the bytes of a slab to its memory,
zeroed, uint8 `[num_blocks, slab_bytes]`."""


class ModelRunner:
    """Implements `Runner`: `submit` computes at once, in the thread that calls it."""

    def __init__(self, settings: EngineSettings, *, storage: Storage | None = None) -> None:
        """Load the model, and its draft model, and reserve the pool, on the device that the settings name;
        `storage` where the pool is to be shared with other processes.

        Raises `ModelError`, `ConfigError` or `InsufficientMemory`.
        """
        self.device = device = choose_device(settings)
        limits = loading.step_limits(settings, device)
        overrides = parse_overrides(settings.hf_overrides)
        folder = resolve_model(
            settings.model, settings.revision, weights=settings.load_format == "auto", overrides=overrides
        )
        config = read_config(folder, overrides, required=True)
        self.config = parse_model_config(config)
        description = describe_model(folder, config, with_sampling_defaults=False)
        length = loading.context_length(settings, self.config)
        dtype = loading.choose_dtype(settings, self.config.dtype, device)
        self.backend = device.backend(dtype)
        self.model = loading.load_model(settings, folder, self.config, device, self.backend, length)

        layout = loading.kv_layout(self.config, settings.block_size, dtype)
        self.draft: Drafter | None = None
        if settings.uses_draft_model:
            target = Target(self.config, description, dtype, length, limits.max_num_seqs)
            if settings.speculative_by_text:
                self.draft = ReencodingDraftModel(settings, device, target)
            else:
                self.draft = DraftModel(settings, device, target)
            if self.draft.layout is not None:
                layout = layout.with_draft(self.draft.layout)
        num_blocks = loading.pool_size(settings, layout, length, limits.max_num_seqs, device)
        slab_bytes = layout.slab_bytes
        memory = (
            storage(device.torch_device, num_blocks, slab_bytes)
            if storage is not None
            else device.pool(num_blocks, slab_bytes)
        )
        self.cache = KVCache(layout, num_blocks, memory)
        vocab_size = self.config.vocab_size
        slots = num_sampler_slots(limits.max_num_seqs)
        self.sampler = Sampler(vocab_size, slots, device.sampling(vocab_size))
        self._failed = False  # the last step
        self._spoiled_ids: frozenset[int] = frozenset()  # of the last step
        self._last: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # its number, its tokens
        self.facts = EngineFacts(
            fingerprint=Fingerprint(
                model=settings.served_model_name or model_name(settings.model, folder),
                revision=model_revision(folder, overrides)
                if settings.load_format != "dummy"
                else f"dummy-{settings.seed}",
                layout=layout.describe(),
                numerics=self.backend.numerics_class + self.config.rope.numerics(length),
                block_size=settings.block_size,
                tokenizer=description.tokenizer_digest,
                draft=self.draft.identity if self.draft is not None else "",
            ),
            layout=layout,
            num_blocks=num_blocks,
            vocab_size=self.config.vocab_size,
            max_model_len=length,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            stop_token_ids=tuple(description.stop_token_ids),
            folder=folder,
            prompt_rows=self.backend.row_plan.prompt_rows,
            on_host=device.torch_device.type == "cpu",
            draft=self.draft.facts if self.draft is not None else None,
            unread_fields=tuple(unknown_fields(description.config)),
        )

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
        sound = sound_rows(step, hidden)
        ids: frozenset[int] | None = None
        if filled is not None:
            self.device.synchronize()
            ids = self._spoiled(step, batch, sound)
            filled(ids)
        scored = self._score_prompts(step, batch, hidden)
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

    def close(self) -> None:
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
        filled = filled_blocks(step, self.facts.layout.block_size)
        going_on = self._spoiled_ids.intersection(step.sequence_ids.tolist())
        self._spoiled_ids = spoiled(step, batch, sound) | infinite(filled, self.cache.own_elements) | going_on
        return self._spoiled_ids

    def _score_prompts(
        self, step: StepInput, batch: Batch, hidden: Tensor
    ) -> tuple[tuple[TokenLogprob, ...], ...]:
        scored = []
        for chunk in step.scored:
            row, entries = batch.first_rows[chunk.chunk], []
            for begin in range(0, len(chunk.targets), SCORED_AT_ONCE):
                part = chunk.targets[begin : begin + SCORED_AT_ONCE]
                logits = self.model.logits(hidden[row + begin : row + begin + len(part)])
                found, _ = self.sampler.logprobs(logits, part, np.full(len(part), chunk.top))
                entries += [TokenLogprob.of(found, i, chunk.top) for i in range(len(part))]
            scored.append(tuple(entries))
        return tuple(scored)
