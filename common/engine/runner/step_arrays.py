"""Arrays of a step side by side in one buffer, so that one copy takes all of them.

Owns where each lies. A host fills a pinned buffer and the device reads its copy, at the same offsets.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

ALIGNED = 256  # bytes, as torch's own memory is at least: what a kernel is compiled for

_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def host(self, memory: NDArray[np.uint8]) -> NDArray[np.generic]:
        return memory[self.offset : self.end].view(self.dtype).reshape(self.shape)

    def device(self, memory: Tensor) -> Tensor:
        return memory[self.offset : self.end].view(_TORCH[self.dtype]).view(self.shape)


class StepArrays:
    """Places by name, one after the other; what begins with the same ones has those at the same offsets."""

    def __init__(self, start: int = 0) -> None:
        self.places: dict[str, Place] = {}
        self.end = start  # bytes

    def add(self, name: str, dtype: DTypeLike, *shape: int) -> None:
        assert name not in self.places
        place = Place(-(-self.end // ALIGNED) * ALIGNED, shape, np.dtype(dtype))
        self.places[name], self.end = place, place.end

    def fill(
        self, memory: NDArray[np.uint8], name: str, values: NDArray[np.generic] | None, rest: int = 0
    ) -> None:
        """`values` first, if there are any, `rest` behind them."""
        place, count = self.places[name].host(memory), 0
        if values is not None:
            count = len(values)
            place[:count] = values
        place[count:] = rest

    def host(self, memory: NDArray[np.uint8], name: str) -> NDArray[np.generic]:
        return self.places[name].host(memory)

    def device(self, memory: Tensor, name: str) -> Tensor:
        return self.places[name].device(memory)
