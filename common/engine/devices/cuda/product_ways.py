"""The ways to compute a product: our kernel with some tile, or the vendor's library.

Owns how each is called. Which one serves is for `settling.py` to prove.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cuda import product_plans
from common.engine.devices.cuda.kernels.products import silu_mul_kernel
from common.engine.devices.cuda.launch import Launch
from common.engine.devices.cuda.product_plans import Order, Shape, Tile
from common.engine.devices.cuda.settling import Weight

_BLOCK = 1024


class Workspace:
    """What the programs of a launch leave for the last one of a tile. One launch at a time uses it."""

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(1, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def grow(self, partials: int, tiles: int) -> None:
        """To so much at least. Never while a graph that was captured with it is in use: that goes on with the
        memory there was."""
        if partials > len(self.partials):
            self.partials = self.partials.new_empty(partials)
        if tiles > len(self.arrived):
            self.arrived = self.arrived.new_zeros(tiles)

    def clear(self) -> None:
        """After a launch that may not have come to its end."""
        self.arrived.zero_()


class TiledWay:
    """Our kernel. Implements `Way`; parallel ones for as many rows as the workspace was grown for."""

    def __init__(
        self, shape: Shape, order: Order, tile: Tile, multiprocessors: int, workspace: Workspace
    ) -> None:
        self.name = tile.name
        self.tile = tile
        self._shape, self._order = shape, order
        self._multiprocessors, self._workspace = multiprocessors, workspace
        self._launch = product_plans.launch(shape, order, tile)

    def reserve(self, rows: int) -> None:
        """Room for launches of at most so many rows."""
        if self.tile.parallel:
            tiles = self.tile.tiles(self._shape, rows)
            self._workspace.grow(self.tile.partials(self._shape, self._order, rows), tiles)

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        tensor, (rows, depth) = weight.tensor, x.shape
        programs = self.tile.programs(self._shape, self._order, rows, self._multiprocessors)
        bias = tensor if weight.bias is None else weight.bias  # any pointer, where there is none
        partials, arrived = self._workspace.partials, self._workspace.arrived
        numbers = rows, out.shape[1], depth, x.stride(0), tensor.stride(0)
        self._launch((programs,), x, tensor, bias, out, partials, arrived, *numbers)


class LibraryWay:
    """cuBLAS through torch, told to keep to one order as far as torch lets it: sums in float32 throughout, no
    range of columns apart. Implements `Way`. Not for graphs where `gated`, for it allocates."""

    name = "library"

    def __init__(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = (False, False)  # the second: no split of columns
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_accumulation = False

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        if not weight.shape.gated and weight.bias is None:
            torch.mm(x, weight.tensor.T, out=out)
            return
        both = F.linear(x, weight.tensor, weight.bias)
        if weight.shape.gated:
            silu_mul(both, out)
        else:
            out.copy_(both)


def silu_mul(both: Tensor, out: Tensor) -> None:
    """out `[rows, width]` = silu(gate) * up of both `[rows, 2 * width]`, as the epilogue computes it."""
    count = out.numel()
    _silu_mul()((-(-count // _BLOCK),), both, out, count, out.shape[1])


@functools.cache
def _silu_mul() -> Launch:
    return Launch(kernel=silu_mul_kernel, constants={"BLOCK": _BLOCK}, num_warps=4)
