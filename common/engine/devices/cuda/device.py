"""A CUDA device: what is its own so far. It computes with the operations of `reference`,
and chooses tokens by kernels of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.devices.cuda.flash_attention import FlashAttention
from common.engine.devices.cuda.flashinfer import FlashInferAttention
from common.engine.devices.cuda.library_attention import LibraryAttention, LibraryBackend
from common.engine.devices.cuda.memory_share import MemoryShare
from common.engine.devices.cuda.queue import CudaQueue
from common.engine.devices.device import Backend, StepLimits
from common.engine.devices.filling import Filler, num_readers
from common.engine.devices.kv_cache import TORCH_DTYPES
from common.engine.devices.queue import DeviceQueue
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.sampling import Sampling, StepSampling
from common.engine.devices.staging import StagedFiller
from common.errors import ConfigError
from common.settings.config import EngineSettings

LARGE_BYTES = 70 << 30  # of memory: from there on vLLM gives a step more tokens, too


class CudaDevice:
    """See `Device`. The one that the settings name, else the first that the process sees."""

    def __init__(self, settings: EngineSettings) -> None:
        named = settings.device.partition(":")[2]
        if named and int(named) >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"device cuda:{named} is set, but torch sees {count} "
                f"GPU{'' if count == 1 else 's'}, cuda:0 to cuda:{count - 1}",
                param="device",
            )
        self.torch_device = torch.device("cuda", int(named or 0))
        self._settings = settings
        self._share: MemoryShare | None = None

    @staticmethod
    def is_present() -> bool:
        return torch.cuda.is_available()

    def default_limits(self) -> StepLimits:
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        return StepLimits(256, 8192 if total >= LARGE_BYTES else 2048)

    def preferred_dtype(self, stored: str) -> torch.dtype:
        return TORCH_DTYPES.get(stored, torch.bfloat16)

    def backend(self, dtype: torch.dtype) -> Backend:
        torch.cuda.set_device(self.torch_device)  # of this thread, for what is launched without a device
        name = torch.cuda.get_device_name(self.torch_device)
        library = self._attention()
        if library is not None:
            return LibraryBackend(self.torch_device, dtype, name, library, self._settings.block_size)
        return ReferenceBackend(self.torch_device, dtype, name)

    def _attention(self) -> LibraryAttention | None:
        """The library that the settings name."""
        block_size = self._settings.block_size
        if self._settings.attention == "flashinfer":
            return FlashInferAttention(self.torch_device, block_size)
        if self._settings.attention == "flash-attn":
            major, _ = torch.cuda.get_device_capability(self.torch_device)
            return FlashAttention(self.torch_device, block_size, major)
        return None

    def sampling(self, vocab_size: int) -> Sampling:
        return self.step_sampling(vocab_size)

    def filler(self) -> Filler:
        queue = CudaQueue(self.torch_device, torch.cuda.current_stream(self.torch_device))
        return StagedFiller(queue, self.torch_device, num_readers())

    def queue(self) -> DeviceQueue | None:
        return None  # the reference's operations wait for the device themselves

    def step_sampling(self, vocab_size: int) -> StepSampling:
        # Triton is there wherever torch is built for CUDA, and not on every other machine.
        from common.engine.devices.cuda.sampling import CudaSampling

        properties = torch.cuda.get_device_properties(self.torch_device)
        return CudaSampling(vocab_size, self.torch_device, multiprocessors=properties.multi_processor_count)

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        return torch.zeros((num_blocks, slab_bytes), dtype=torch.uint8, device=self.torch_device)

    def free_memory(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        own = torch.cuda.memory_reserved(self.torch_device)
        if self._share is None:
            settings = self._settings
            self._share = MemoryShare(
                settings.gpu_memory_utilization, total, free + own, others=settings.share_gpu
            )
        return self._share.left(free, own)

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
