"""Products by the vendor's library as it likes, without an order of summation: what ours are compared with.

Owns nothing of the engine: for the time of a measurement it takes the place of the products of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cuda import backend
from common.engine.devices.cuda.products import ANY_ROWS
from common.engine.devices.rows import RowPlan


class FreeLinear:
    """See `Linear` of device.py."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> None:
        self._weight, self._bias, self._gated = weight, bias, gated

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        product = F.linear(x, self._weight, self._bias)
        if not self._gated:
            return product
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class FreeProducts:
    """What `CudaBackend` asks of its products."""

    row_plan: RowPlan = ANY_ROWS

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> FreeLinear:
        return FreeLinear(weight, bias)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> FreeLinear:
        return FreeLinear(weight, bias, gated=True)

    def tied_linear(self, embedding: Tensor) -> FreeLinear:
        return FreeLinear(embedding, None)

    def settle(self) -> str:
        return "free"


@contextmanager
def products_without_an_order() -> Iterator[None]:
    ours = backend.GpuProducts
    backend.GpuProducts = FreeProducts  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        backend.GpuProducts = ours  # type: ignore[misc]
