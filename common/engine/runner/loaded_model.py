"""A model that is loaded, on its device: what runners compute with, however they wait for it.

Owns weights, the draft model, the KV pool, and what a core has to know of them (`EngineFacts`). Whoever
computes decides how large the pool is, for that depends on what a step needs beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.engine.devices import scaled_rows
from common.engine.devices.choice import choose_device
from common.engine.devices.device import Device
from common.engine.devices.kv_cache import KVCache
from common.engine.interface import EngineFacts
from common.engine.runner import loading
from common.engine.runner.draft_model import DraftModel
from common.engine.runner.draft_step import Drafter, Target
from common.engine.runner.reencoding_draft import ReencodingDraftModel
from common.engine.runner.sampler import Sampler
from common.kv_layout import Fingerprint
from common.model_files import model_name, model_revision, resolve_model
from common.model_folder.config_fields import unknown_fields
from common.model_folder.description import describe_model, parse_overrides, read_config
from common.model_folder.model_config import parse_model_config
from common.settings.config import EngineSettings

Storage = Callable[[torch.device, int, int], Tensor]
"""From the device that a pool must lie on, its number of blocks and the bytes of a slab to its memory,
zeroed, uint8 `[num_blocks, slab_bytes]`."""


class LoadedModel:
    """Without its pool until `open_pool`."""

    cache: KVCache
    facts: EngineFacts
    sampler: Sampler  # made by whoever computes

    def __init__(self, settings: EngineSettings, device: Device | None = None) -> None:
        """Load the model, and its draft model, on the device that the settings name, unless one is given.

        Raises `ModelError`, `ConfigError` or `InsufficientMemory`.
        """
        self.settings = settings
        self.device = device = device or choose_device(settings)
        self.limits = loading.step_limits(settings, device)
        self._overrides = overrides = parse_overrides(settings.hf_overrides)
        self._folder = folder = resolve_model(
            settings.model, settings.revision, weights=settings.load_format == "auto", overrides=overrides
        )
        config = read_config(folder, overrides, required=True)
        self.config = parse_model_config(config)
        self._description = describe_model(folder, config, with_sampling_defaults=False)
        self.max_model_len = length = loading.context_length(settings, self.config)
        dtype = loading.choose_dtype(settings, self.config.dtype, device)
        self.backend = device.backend(dtype)
        self._kv_dtype = loading.choose_kv_dtype(settings, self.backend)
        self.model = loading.load_model(settings, folder, self.config, device, self.backend, length)

        self.layout = loading.kv_layout(self.config, settings.block_size, self._kv_dtype)
        self.draft: Drafter | None = None
        if settings.uses_draft_model:
            target = Target(self.config, self._description, dtype, length, self.limits.max_num_seqs)
            if settings.speculative_by_text:
                self.draft = ReencodingDraftModel(settings, device, target)
            else:
                self.draft = DraftModel(settings, device, target)
            if self.draft.layout is not None:
                self.layout = self.layout.with_draft(self.draft.layout)

    def open_pool(self, num_blocks: int, storage: Storage | None) -> None:
        """Reserve it; `storage` where it is to be shared with other processes."""
        device, slab_bytes = self.device, self.layout.slab_bytes
        memory = (
            storage(device.torch_device, num_blocks, slab_bytes)
            if storage is not None
            else device.pool(num_blocks, slab_bytes)
        )
        self.cache = KVCache(self.layout, num_blocks, memory)
        self.facts = self._facts(num_blocks)

    def _facts(self, num_blocks: int) -> EngineFacts:
        settings, folder, length, description = (
            self.settings,
            self._folder,
            self.max_model_len,
            self._description,
        )
        return EngineFacts(
            fingerprint=Fingerprint(
                model=settings.served_model_name or model_name(settings.model, folder),
                revision=model_revision(folder, self._overrides)
                if settings.load_format != "dummy"
                else f"dummy-{settings.seed}",
                layout=self.layout.describe(),
                numerics=self.backend.numerics_class
                + self.config.rope.numerics(length)
                + scaled_rows.numerics(self._kv_dtype),
                block_size=settings.block_size,
                tokenizer=description.tokenizer_digest,
                draft=self.draft.identity if self.draft is not None else "",
            ),
            layout=self.layout,
            num_blocks=num_blocks,
            vocab_size=self.config.vocab_size,
            max_model_len=length,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            stop_token_ids=tuple(description.stop_token_ids),
            folder=folder,
            prompt_rows=self.backend.row_plan.prompt_rows,
            on_host=self.device.torch_device.type == "cpu",
            draft=self.draft.facts if self.draft is not None else None,
            unread_fields=tuple(unknown_fields(description.config)),
        )
