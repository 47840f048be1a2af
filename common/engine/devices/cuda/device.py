"""A CUDA device: what is its own so far. It computes with the operations of `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.devices.device import Backend, Sampling
from common.engine.devices.kv_cache import TORCH_DTYPES
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.reference.sampling import TorchSampling
from common.settings.config import EngineSettings


class CudaDevice:
    """See `Device`. The first one that the process sees."""

    def __init__(self, settings: EngineSettings) -> None:
        self.torch_device = torch.device("cuda", 0)

    @staticmethod
    def is_present() -> bool:
        return torch.cuda.is_available()

    def preferred_dtype(self, stored: str) -> torch.dtype:
        return TORCH_DTYPES.get(stored, torch.bfloat16)

    def backend(self, dtype: torch.dtype) -> Backend:
        name = torch.cuda.get_device_name(self.torch_device)
        return ReferenceBackend(self.torch_device, dtype, name)

    def sampling(self, vocab_size: int) -> Sampling:
        return TorchSampling(vocab_size, self.torch_device)

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        return torch.zeros((num_blocks, slab_bytes), dtype=torch.uint8, device=self.torch_device)

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def default_pool_bytes(self, free: int) -> int:
        return free // 2

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def is_lost(self, error: BaseException) -> bool:
        """After an illegal access or an assertion in a kernel, every later call of CUDA fails; a lack
        of memory passes."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        text = str(error)
        return isinstance(error, RuntimeError) and "CUDA error" in text and "out of memory" not in text
