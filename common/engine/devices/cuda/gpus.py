"""The GPUs that this process may use: which there are, and what each is called wherever it is seen.

Owns the one place where GPUs are listed. Who may have which is decided elsewhere (common/node/gpus.py):
CUDA_VISIBLE_DEVICES and a container's runtime have done their part before, so an index here is one of
what they left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or the part of one that MIG has made a device of its own."""

    index: int  # in this process, as in `cuda:N`
    uuid: str  # the same in every process and container, as nvidia-smi shows it
    name: str
    total_memory: int  # bytes

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.uuid})"


class Gpus(Protocol):
    def visible(self) -> Sequence[Gpu]:
        """By index, without gaps; none where there is no GPU, or no driver."""
        ...


class TorchGpus:
    """`Gpus` as torch sees them. Allocates nothing on any of them."""

    def visible(self) -> Sequence[Gpu]:
        if not torch.cuda.is_available():
            return ()
        return [self._gpu(index) for index in range(torch.cuda.device_count())]

    def _gpu(self, index: int) -> Gpu:
        properties = torch.cuda.get_device_properties(index)
        kind = "MIG" if " MIG " in properties.name else "GPU"
        return Gpu(index, f"{kind}-{properties.uuid}", properties.name, properties.total_memory)
