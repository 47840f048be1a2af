"""A CUDA device: its memory, its errors, and what computes on it.

That is kernels of its own, in steps of a queue; or, for who compares, the operations of `reference`, many of
which wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.devices.cuda.card import Card
from common.engine.devices.cuda.flash_attention import FlashAttention
from common.engine.devices.cuda.flashinfer import FlashInferAttention
from common.engine.devices.cuda.library_attention import LibraryAttention, LibraryBackend
from common.engine.devices.cuda.memory_share import MemoryShare
from common.engine.devices.cuda.queue import CudaQueue
from common.engine.devices.device import Backend, StepLimits
from common.engine.devices.filling import Filler, num_readers
from common.engine.devices.kv_cache import SCALED_KV_DTYPES, TORCH_DTYPES
from common.engine.devices.queue import DeviceQueue
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.sampling import Sampling, StepSampling
from common.engine.devices.staging import StagedFiller
from common.errors import ConfigError
from common.settings.config import EngineSettings

_OF_CUDA = ("CUDA error", "Triton Error [CUDA]")
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
        card, settings, library = Card.of(self.torch_device), self._settings, self._attention()
        if library is not None:
            return LibraryBackend(self.torch_device, dtype, card.name, library, settings.block_size)
        if not self._has_queue:
            return ReferenceBackend(self.torch_device, dtype, card.name)
        from common.engine.devices.cuda.backend import CudaBackend
        from common.engine.devices.cuda.tuning import Tuning

        most_rows = 1 if settings.speculative == "off" else 1 + settings.most_drafted
        return CudaBackend(
            self.torch_device,
            dtype,
            card,
            block_size=settings.block_size,
            most_rows=most_rows,
            kv_dtype=SCALED_KV_DTYPES.get(settings.kv_cache_dtype),
            tuning=Tuning.of_card(card.name, self.torch_device),
        )

    @property
    def _has_queue(self) -> bool:
        """Libraries plan a step on the host, and the reference's operations wait in many places."""
        return self._settings.kernels != "reference" and self._settings.attention == "auto"

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
        return CudaQueue(self.torch_device) if self._has_queue else None

    def step_sampling(self, vocab_size: int) -> StepSampling:
        # Triton is there wherever torch is built for CUDA, and not on every other machine.
        from common.engine.devices.cuda.sampling import CudaSampling

        card = Card.of(self.torch_device)
        return CudaSampling(vocab_size, self.torch_device, multiprocessors=card.multiprocessors)

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
        """Of this thread's stream: another one may hold a transfer whose peer has stalled."""
        torch.cuda.current_stream(self.torch_device).synchronize()

    def is_lost(self, error: BaseException) -> bool:
        """After an illegal access or an assertion in a kernel, every later call of CUDA fails, by whichever
        library it is made; a lack of memory passes."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        text = str(error)
        return isinstance(error, RuntimeError) and (
            any(sign in text for sign in _OF_CUDA) and "out of memory" not in text
        )
