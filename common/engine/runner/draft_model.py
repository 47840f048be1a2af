"""A smaller model that guesses what the model will say, in the same steps and on the same device.

Owns its weights, and what a draft of it is. Its KV lies behind the model's in every slab: who holds a block
holds both, and copies, handoffs and the size of the pool need no word about it. Which positions it has
computed, and for whom it guesses how many tokens, the core says (core/drafts.py).

A guess is sampled as the model's own token will be: by the request's parameters, with the noise of its
position. Where the two distributions are alike the two tokens are equal, at any temperature.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.device import Device
from common.engine.devices.kv_cache import KVCache
from common.engine.interface import Chunks, DraftFacts, DraftInput, DraftReport, StepInput
from common.engine.runner import loading
from common.engine.runner.draft_step import (
    ANY_TOKEN,
    Target,
    drafted_chunks,
    load_draft,
    logits_after,
    with_drafts,
)
from common.engine.runner.sampler import Sampler
from common.engine.sampling.records import RowFault, SampleRows
from common.model_files import model_revision
from common.settings.config import EngineSettings


@dataclasses.dataclass(slots=True)
class _Guesses:
    """Of the chunks that get any, in the order of the step's chunks."""

    counts: NDArray[np.int64]  # [chunks] wanted
    slots: NDArray[np.int64]  # [chunks] of the sampler
    positions: NDArray[np.int64]  # [chunks] of the first
    tables: NDArray[np.int32]  # [chunks, blocks]
    tokens: NDArray[np.int64]  # [chunks, most wanted]
    sound: NDArray[np.bool_]  # [chunks]


class DraftModel:
    """Implements `Drafter`."""

    def __init__(self, settings: EngineSettings, device: Device, target: Target) -> None:
        """Raises as `load_draft`."""
        draft = load_draft(settings, device, target, target.config.num_layers)
        self._model, self._backend = draft.model, draft.backend
        self._own_vocab_size, self._vocab_size = draft.config.vocab_size, target.config.vocab_size
        kv_dtype = loading.choose_kv_dtype(settings, draft.backend)
        self.layout = loading.kv_layout(draft.config, settings.block_size, kv_dtype)
        revision = (
            model_revision(draft.folder, {}) if settings.load_format != "dummy" else f"dummy-{settings.seed}"
        )
        self.identity = f"{draft.name}@{revision}"
        self.facts = DraftFacts(draft.name, draft.length, draft.relative_size)

    def run(
        self, step: StepInput, wanted: DraftInput, cache: KVCache, sampler: Sampler
    ) -> tuple[StepInput, DraftReport]:
        """Compute what is wanted. The step with tokens where `TO_BE_DRAFTED` stood, whatever happens."""
        begun = time.perf_counter()
        guesses, error = _expected(step, wanted), ""
        try:
            self._guess(guesses, wanted, cache, sampler)
        except Exception as failure:  # it costs the drafts; a device that is lost fails the step itself
            error = repr(failure) or "failed"
        faulty = step.sequence_ids[drafted_chunks(step)[~guesses.sound]]
        report = DraftReport(time.perf_counter() - begun, frozenset(faulty.tolist()), error=error)
        return with_drafts(step, guesses.tokens), report

    def _guess(self, guesses: _Guesses, wanted: DraftInput, cache: KVCache, sampler: Sampler) -> None:
        """The first ones from the positions that it lacked, the others one after the other."""
        self._backend.enter_thread()
        logits = self._logits(wanted, (wanted.counts > 0).astype(np.int64), cache)
        order = np.argsort(wanted.chunks[wanted.counts > 0])
        logits = logits[torch.from_numpy(order).to(logits.device)]
        going_on = np.arange(len(guesses.counts))
        for place in range(int(guesses.counts.max(initial=0))):
            rows = SampleRows(
                slots=guesses.slots[going_on],
                positions=guesses.positions[going_on] + place,
                drafted=guesses.tokens[going_on, :place].ravel(),
                draft_start=np.arange(len(going_on)) * place,
                draft_length=np.full(len(going_on), place),
            )
            output = sampler.sample(logits, rows)
            sound = output.faults == RowFault.NONE
            guesses.sound[going_on[~sound]] = False
            going_on, tokens = going_on[sound], output.token_ids[sound]
            guesses.tokens[going_on, place] = tokens
            more = guesses.counts[going_on] > place + 1
            going_on, tokens = going_on[more], tokens[more]
            if not len(going_on):
                return
            each = np.ones(len(going_on), np.int64)
            following = Chunks(
                num_generated=len(going_on),
                starts=guesses.positions[going_on] + place,
                lengths=each,
                token_ids=tokens,
                generated_tables=guesses.tables[going_on],
                prompt_tables=guesses.tables[:0],
            )
            logits = self._logits(following, each, cache)

    def _logits(self, chunks: Chunks, num_sampled: NDArray[np.int64], cache: KVCache) -> Tensor:
        """After the last position of each chunk that is sampled, `[sampled, the target's vocabulary]`."""
        known = self._own_vocab_size  # what one of them has beyond the other's is padding
        if known < self._vocab_size:
            chunks = dataclasses.replace(chunks, token_ids=np.minimum(chunks.token_ids, known - 1))
        logits = logits_after(self._model, self._backend, chunks, num_sampled, cache)
        if known < self._vocab_size:
            return F.pad(logits, (0, self._vocab_size - known), value=-torch.inf)
        return logits[:, : self._vocab_size]


def _expected(step: StepInput, wanted: DraftInput) -> _Guesses:
    chunks = drafted_chunks(step)
    assert (np.sort(wanted.chunks[wanted.counts > 0]) == chunks).all(), "drafts of other chunks are wanted"
    counts = step.num_drafted[chunks]
    num_sampled = np.where(step.samples, 1 + step.num_drafted, 0)
    first = (np.cumsum(num_sampled) - num_sampled)[chunks]  # of the rows that are sampled
    return _Guesses(
        counts=counts,
        slots=step.sampled.slots[first],
        positions=step.sampled.positions[first],
        tables=step.generated_tables[chunks],
        tokens=np.full((len(chunks), int(counts.max(initial=0))), ANY_TOKEN, np.int64),
        sound=np.ones(len(chunks), np.bool_),
    )
