"""What all draft models have in common: how one is loaded for its target, how its drafts come into a step.

Owns the conditions under which two models are a pair. What a draft is, each of them decides.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.device import Backend, Device
from common.engine.devices.kv_cache import KVCache
from common.engine.interface import TO_BE_DRAFTED, Chunks, DraftFacts, DraftInput, DraftReport, StepInput
from common.engine.model.decoder import Model
from common.engine.runner import loading
from common.engine.runner.batch import lay_out
from common.engine.runner.sampler import Sampler
from common.errors import ConfigError, PdqError
from common.kv_layout import KVLayout
from common.model_files import SHIPPED_DRAFT, model_name, resolve_model
from common.model_folder.description import ModelDescription, describe_model, read_config
from common.model_folder.model_config import ModelConfig, parse_model_config
from common.model_folder.tokenizer import tokenizer_digest
from common.settings.config import EngineSettings

ANY_TOKEN = 0  # where a draft could not be made


class Drafter(Protocol):
    """Nothing that it does can fail a step: what could not be guessed is some token or other, which is found
    wrong."""

    facts: DraftFacts

    @property
    def layout(self) -> KVLayout | None:
        """Of its part of a slab."""
        ...

    @property
    def identity(self) -> str:
        """Names what is in that part; "" without one."""
        ...

    def run(
        self, step: StepInput, wanted: DraftInput, cache: KVCache, sampler: Sampler
    ) -> tuple[StepInput, DraftReport]:
        """Compute what is wanted. The step with tokens where `TO_BE_DRAFTED` stood, whatever happens."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The model whose tokens are guessed."""

    config: ModelConfig
    description: ModelDescription
    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int  # in a step


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedDraft:
    name: str
    folder: Path
    config: ModelConfig
    description: ModelDescription
    model: Model
    backend: Backend
    length: int  # positions that it computes
    relative_size: float  # as in `DraftFacts`


def load_draft(settings: EngineSettings, device: Device, target: Target, first_layer: int) -> LoadedDraft:
    """`first_layer` as in `Model`. Raises `ModelError` or `InsufficientMemory`, which name it, or the
    `ConfigError` that says why it cannot draft for `target`."""
    name = settings.speculative_model or str(SHIPPED_DRAFT)
    try:
        folder = resolve_model(name, "", weights=settings.load_format == "auto", overrides={})
        description = describe_model(folder, with_sampling_defaults=False)
        config = parse_model_config(read_config(folder, required=True))
        _check_pair(name, config, description, target, by_text=settings.speculative_by_text)
        length = min(target.max_model_len, config.rope.positions)
        backend = device.backend(target.dtype)
        model = loading.load_model(settings, folder, config, device, backend, length, first_layer)
    except PdqError as error:
        raise type(error)(f"the draft model: {error.message}", param="speculative_model") from error
    size = loading.weight_count(config) / loading.weight_count(target.config)
    return LoadedDraft(model_name(name, folder), folder, config, description, model, backend, length, size)


def _check_pair(
    name: str, config: ModelConfig, description: ModelDescription, target: Target, *, by_text: bool
) -> None:
    """`ConfigError` unless the two give every token id the same meaning, or both have texts for them."""
    ours, theirs = target.description.tokenizer, description.tokenizer
    if (ours is None) != (theirs is None) or (by_text and ours is None):
        without = name if theirs is None else "the model"
        raise ConfigError(f"{without} has no tokenizer, so that nobody knows what a token of it says")
    if by_text:
        return
    if ours is not None and theirs is not None:
        if tokenizer_digest(ours, ()) != tokenizer_digest(theirs, ()):
            raise ConfigError(
                f"{name} has another tokenizer than the model; with speculative_by_text it can draft all "
                "the same"
            )
    elif config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"{name} has a vocabulary of {config.vocab_size} tokens, the model one of "
            f"{target.config.vocab_size}"
        )


def logits_after(
    model: Model, backend: Backend, chunks: Chunks, num_sampled: NDArray[np.int64], cache: KVCache
) -> Tensor:
    """Compute `chunks`; logits `[sampled, vocab]` of the last `num_sampled` `[chunks]` positions of each."""
    batch = lay_out(chunks, num_sampled, cache.layout.block_size, backend.row_plan)
    hidden = model.forward(backend.prepare(batch.rows), cache)
    return model.logits(hidden[torch.from_numpy(batch.sampled).to(hidden.device)])


def drafted_chunks(step: StepInput) -> NDArray[np.intp]:
    """The chunks of a step whose drafts are guessed here, `[chunks that get any]`."""
    ends = np.cumsum(step.lengths)
    return np.flatnonzero((step.num_drafted > 0) & (step.token_ids[ends - 1] == TO_BE_DRAFTED))


def with_drafts(step: StepInput, tokens: NDArray[np.int64]) -> StepInput:
    """The step with `tokens` `[drafted_chunks, most]` where they were to be drafted."""
    counts = step.num_drafted[drafted_chunks(step)]
    drafts = tokens[np.arange(tokens.shape[1]) < counts[:, None]]
    sampled = step.sampled
    assert sampled.drafted is not None
    return dataclasses.replace(
        step,
        token_ids=_filled_in(step.token_ids, drafts),
        sampled=dataclasses.replace(sampled, drafted=_filled_in(sampled.drafted, drafts)),
    )


def _filled_in(tokens: NDArray[np.int64], drafts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`drafts`, in order, in the places where tokens are to be drafted."""
    tokens = tokens.copy()
    tokens[tokens == TO_BE_DRAFTED] = drafts
    return tokens
