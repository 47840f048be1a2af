"""From settings to the parts of an engine on its device: weights, lengths, and how large the pool is.

Owns what absent settings mean. Every failure is a `ConfigError`, `ModelError` or
`InsufficientMemory` that names the setting, file or tensor; nothing is kept of a load that failed.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

from common.engine.devices.device import Backend, Device, StepLimits
from common.engine.devices.kv_cache import SCALED_KV_DTYPES, TORCH_DTYPES, blocks_for_memory
from common.engine.model.decoder import Model, tensor_shapes
from common.engine.model.weights import Checkpoint, RandomWeights, StoredWeights
from common.errors import ConfigError, InsufficientMemory
from common.kv_layout import SCALED_DTYPES, KVLayout
from common.model_folder.model_config import ModelConfig
from common.settings.config import EngineSettings


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(settings: EngineSettings, stored: str, device: Device) -> torch.dtype:
    if settings.dtype == "auto":
        return device.preferred_dtype(stored)
    return TORCH_DTYPES[settings.dtype]


def step_limits(settings: EngineSettings, device: Device) -> StepLimits:
    """From the settings, or the device's own, as far as those do not contradict what is set."""
    own, seqs, tokens = device.default_limits(), settings.max_num_seqs, settings.max_num_batched_tokens
    if seqs is None:
        seqs = own.max_num_seqs if tokens is None else min(own.max_num_seqs, tokens)
    if tokens is None:
        tokens = max(own.max_num_batched_tokens, seqs)
    return StepLimits(seqs, tokens)


def choose_kv_dtype(settings: EngineSettings, backend: Backend) -> str:
    """In which keys and values are kept. `ConfigError` where the backend cannot."""
    wanted = dtype_name(SCALED_KV_DTYPES.get(settings.kv_cache_dtype, backend.dtype))
    if wanted in SCALED_DTYPES and wanted not in backend.kv_dtypes:
        kernels = backend.numerics_class.partition("/")[0]
        raise ConfigError(
            f"kv_cache_dtype {settings.kv_cache_dtype}: the kernels in use ({kernels}) do not keep keys and "
            "values in it; take --kv-cache-dtype auto, or --kernels reference",
            param="kv_cache_dtype",
        )
    return wanted


def context_length(settings: EngineSettings, config: ModelConfig) -> int:
    longest = config.rope.positions
    if settings.max_model_len is None:
        return longest
    if settings.max_model_len > longest:
        raise ConfigError(
            f"max_model_len {settings.max_model_len} is beyond the model's {longest} positions",
            param="max_model_len",
        )
    return settings.max_model_len


def load_model(
    settings: EngineSettings,
    folder: Path,
    config: ModelConfig,
    device: Device,
    backend: Backend,
    length: int,
    first_layer: int = 0,
) -> Model:
    _check_weights_fit(config, backend.dtype, device, length)
    if settings.load_format == "dummy":
        random = RandomWeights(settings.seed, tied=config.tie_word_embeddings, device=backend.device)
        model = Model(config, backend, random, length, first_layer)
    else:
        with Checkpoint(folder) as checkpoint, device.filler() as filler:
            stored = StoredWeights(checkpoint, filler)
            model = Model(config, backend, stored, length, first_layer)
    backend.settle()
    return model


def weight_count(config: ModelConfig) -> int:
    """Numbers in all tensors of a model."""
    shapes = tensor_shapes(config, has_head=not config.tie_word_embeddings)
    return sum(math.prod(shape) for shape in shapes.values())


def kv_layout(config: ModelConfig, block_size: int, dtype: str) -> KVLayout:
    """`dtype` as `choose_kv_dtype` gives it."""
    return KVLayout.paged_attention(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=dtype,
    )


def _check_weights_fit(config: ModelConfig, dtype: torch.dtype, device: Device, length: int) -> None:
    """Refuse before anything is read what would be killed for its memory half-way."""
    needed = weight_count(config) * dtype.itemsize
    free, place = device.free_memory(), device.torch_device.type
    if needed > free:
        raise InsufficientMemory(
            f"the weights take {needed >> 20} MiB as {dtype_name(dtype)}, and {place} has "
            f"{free >> 20} MiB of free memory; take a smaller model, a smaller --dtype, or another "
            "machine",
            param="model",
        )
    if (rope := 4 * length * config.head_dim) > free - needed:
        raise InsufficientMemory(
            f"the table of angles for {length} positions takes {rope >> 20} MiB, and {place} "
            f"has {(free - needed) >> 20} MiB beside the weights; lower --max-model-len",
            param="max_model_len",
        )


def pool_size(
    settings: EngineSettings, layout: KVLayout, max_model_len: int, max_num_seqs: int, device: Device
) -> int:
    """From the settings, or as much as all sequences can use, within what the device gives a pool."""
    free = device.free_memory()
    if settings.num_kv_blocks is not None:
        count = settings.num_kv_blocks
    elif settings.kv_cache_memory_bytes is not None:
        count = blocks_for_memory(layout, settings.kv_cache_memory_bytes)
    else:
        useful = max_num_seqs * -(-max_model_len // layout.block_size)
        limit = device.default_pool_bytes(free)
        count = min(useful, blocks_for_memory(layout, limit))
    if count * layout.slab_bytes > free:
        raise InsufficientMemory(
            f"a KV pool of {count * layout.slab_bytes >> 20} MiB does not fit into "
            f"{free >> 20} MiB of free memory; lower --num-kv-blocks or --kv-cache-memory-bytes",
            param="kv_cache_memory_bytes",
        )
    return count


def give_back_memory() -> None:
    """Hand what loading has freed back to the system: glibc keeps about 100 MB of it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries keep nothing
    if trim is not None:
        trim(0)
