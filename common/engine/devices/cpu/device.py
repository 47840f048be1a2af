"""The CPU of this machine, and which of two backends computes on it.

What compiles kernels is imported when it is asked for: who computes elsewhere needs none of it.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import psutil
import torch
from torch import Tensor

from common.engine.devices.device import Backend, StepLimits
from common.engine.devices.filling import MOST_READERS, Filler, HostFiller
from common.engine.devices.sampling import Sampling
from common.errors import ConfigError
from common.settings.config import EngineSettings

DEFAULT_POOL_BYTES = 4 << 30


class CpuDevice:
    """See `Device`."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.attention != "auto":
            raise ConfigError(
                f"attention {settings.attention} is set, which is a library for GPUs; the model runs on the "
                "CPU",
                param="attention",
            )
        self.torch_device = torch.device("cpu")
        self._settings = settings

    @staticmethod
    def is_present() -> bool:
        return True

    def default_limits(self) -> StepLimits:
        return StepLimits(max_num_seqs=64, max_num_batched_tokens=512)

    def preferred_dtype(self, stored: str) -> torch.dtype:
        fast = stored != "float32" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32

    def backend(self, dtype: torch.dtype) -> Backend:
        settings = self._settings
        if settings.kernels == "reference":
            from common.engine.devices.reference.backend import ReferenceBackend

            return ReferenceBackend(self.torch_device, dtype, "cpu")
        from common.engine.devices.cpu.backend import CpuBackend
        from common.engine.devices.cpu.first_start import compile_sampler_beside

        compile_sampler_beside()
        return CpuBackend(dtype, self._threads)

    def filler(self) -> Filler:
        return HostFiller(min(self._threads, MOST_READERS))

    @property
    def _threads(self) -> int:
        return self._settings.threads or len(self._settings.cores) or torch.get_num_threads()

    def sampling(self, vocab_size: int) -> Sampling:
        from common.engine.devices.cpu.sampling import NumbaSampling

        return NumbaSampling(vocab_size)

    def queue(self) -> None:
        """What a CPU is asked for it has done when the call returns."""

    def step_sampling(self, vocab_size: int) -> NoReturn:
        raise AssertionError("a CPU has no queue")

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        """Memory that the system gives when it is first touched."""
        return torch.from_numpy(np.zeros((num_blocks, slab_bytes), np.uint8))

    def free_memory(self) -> int:
        return int(psutil.virtual_memory().available)

    def default_pool_bytes(self, free: int) -> int:
        return min(free // 2, DEFAULT_POOL_BYTES)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back on a CPU."""

    def is_lost(self, error: BaseException) -> bool:
        """A CPU computes on after any error that the process survives."""
        return False
