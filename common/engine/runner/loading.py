"""From settings to the parts of an engine: device, backend, weights, and how large the pool is.

Owns what `auto` and absent settings mean. Every failure is a `ConfigError`, `ModelError` or
`InsufficientMemory` that names the setting, file or tensor; nothing is kept of a load that failed.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

from common.config import EngineSettings
from common.engine.devices.device import Backend
from common.engine.devices.kv_cache import TORCH_DTYPES, blocks_for_memory, free_memory
from common.engine.model.decoder import Model, tensor_shapes
from common.engine.model.weights import Checkpoint, RandomWeights
from common.errors import ConfigError, InsufficientMemory
from common.kv_layout import KVLayout
from common.model_folder.model_config import ModelConfig

DEFAULT_POOL_BYTES = 4 << 30
POOL_SHARE_OF_FREE_MEMORY = 0.5


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda is set, but torch finds no CUDA device", param="device")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def choose_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """`auto` keeps the stored type where the device runs it fast, and float32 otherwise."""
    if wanted != "auto":
        return TORCH_DTYPES[wanted]
    if device.type == "cpu":
        fast = stored != "float32" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return TORCH_DTYPES.get(stored, torch.bfloat16)


def make_backend(settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type == "cpu" and settings.kernels == "auto":
        from common.engine.devices.cpu.backend import CpuBackend

        threads = settings.threads or len(settings.cores) or torch.get_num_threads()
        return CpuBackend(dtype, threads)
    from common.engine.devices.reference.backend import ReferenceBackend

    return ReferenceBackend(device, dtype)


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
    settings: EngineSettings, folder: Path, config: ModelConfig, backend: Backend, length: int
) -> Model:
    _check_weights_fit(config, backend.dtype, backend.device, length)
    if settings.load_format == "dummy":
        tied = config.tie_word_embeddings
        source = RandomWeights(settings.seed, tied=tied, dtype=backend.dtype)
        model = Model(config, backend, source, length)
    else:
        with Checkpoint(folder) as checkpoint:
            model = Model(config, backend, checkpoint, length)
    backend.settle()
    return model


def _check_weights_fit(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, length: int
) -> None:
    """Refuse before anything is read what would be killed for its memory half-way."""
    shapes = tensor_shapes(config, has_head=not config.tie_word_embeddings)
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    free = free_memory(device)
    if needed > free:
        raise InsufficientMemory(
            f"the weights take {needed >> 20} MiB as {dtype_name(dtype)}, and {device.type} has "
            f"{free >> 20} MiB of free memory; take a smaller model, a smaller --dtype, or another "
            "machine",
            param="model",
        )
    if (rope := 4 * length * config.head_dim) > free - needed:
        raise InsufficientMemory(
            f"the table of angles for {length} positions takes {rope >> 20} MiB, and {device.type} "
            f"has {(free - needed) >> 20} MiB beside the weights; lower --max-model-len",
            param="max_model_len",
        )


def pool_size(
    settings: EngineSettings, layout: KVLayout, max_model_len: int, device: torch.device
) -> int:
    """From the settings, or as much as all sequences can use, within half of the free memory."""
    free = free_memory(device)
    if settings.num_kv_blocks is not None:
        count = settings.num_kv_blocks
    elif settings.kv_cache_memory_bytes is not None:
        count = blocks_for_memory(layout, settings.kv_cache_memory_bytes)
    else:
        useful = settings.max_num_seqs * -(-max_model_len // layout.block_size)
        limit = int(free * POOL_SHARE_OF_FREE_MEMORY)
        if device.type == "cpu":
            limit = min(limit, DEFAULT_POOL_BYTES)
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
