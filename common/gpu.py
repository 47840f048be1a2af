"""What a GPU is called, and by whom those of a process are listed. Knows no driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


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
    """What this process may use: CUDA_VISIBLE_DEVICES and a container's runtime have done their part
    before."""

    def visible(self) -> Sequence[Gpu]:
        """By index, without gaps; none where there is no GPU, or no driver."""
        ...
