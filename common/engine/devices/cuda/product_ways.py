"""The ways to compute a product: our kernel with some tile, or the vendor's library.

Owns how each is called. Which one serves is for `settling.py` to prove.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cuda import product_plans
from common.engine.devices.cuda.kernels.products import silu_mul_kernel
from common.engine.devices.cuda.launch import Launch
from common.engine.devices.cuda.product_plans import Order, Shape, Tile
from common.engine.devices.cuda.settling import Way, Weight

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


class TiledWay:
    """Our kernel. Implements `Way`. Where a launch with more rows than were reserved would need a larger
    workspace, its programs sum all ranges one after the other, which gives the same bits."""

    def __init__(
        self, shape: Shape, order: Order, tile: Tile, multiprocessors: int, workspace: Workspace
    ) -> None:
        self.name = tile.name
        self._shape, self._order, self._tile = shape, order, tile
        self._in_turn = dataclasses.replace(tile, parallel=False)
        self._launches = {each: product_plans.launch(shape, order, each) for each in (tile, self._in_turn)}
        self._multiprocessors, self._workspace = multiprocessors, workspace
        self._reserved = 0

    def reserve(self, rows: int) -> None:
        """Room for launches of at most so many rows."""
        self._reserved = rows
        if self._tile.parallel:
            partials = self._tile.partials(self._shape, self._order, rows)
            self._workspace.grow(partials, self._tile.tiles(self._shape, rows))

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        rows, depth = x.shape
        tile = self._tile if rows <= self._reserved else self._in_turn
        programs = tile.programs(self._shape, self._order, rows, self._multiprocessors)
        tensor, workspace = weight.tensor, self._workspace
        bias = tensor if weight.bias is None else weight.bias  # any pointer, where there is none
        numbers = rows, out.shape[1], depth, x.stride(0), tensor.stride(0)
        self._launches[tile](
            (programs,), x, tensor, bias, out, workspace.partials, workspace.arrived, *numbers
        )


class LibraryWay:
    """cuBLAS through torch, told to keep to one order as far as torch lets it: sums in float32 throughout, no
    range of columns apart. It may take another kernel for another number of rows. Implements `Way`."""

    name = "library"

    def __init__(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = (False, False)  # the second: no split of columns
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_accumulation = False

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        if weight.shape.gated:
            silu_mul(F.linear(x, weight.tensor, weight.bias), out)
        elif weight.bias is None:
            torch.mm(x, weight.tensor.T, out=out)
        else:
            out.copy_(F.linear(x, weight.tensor, weight.bias))


class InExactCalls:
    """A way whose kernel may depend on the number of rows, called with a few numbers of rows only, each of
    which a proof can try; the rest goes another way. Implements `Way`."""

    def __init__(self, way: Way, sizes: Sequence[int], rest: Way) -> None:
        """`sizes` descend."""
        self.name = f"{way.name}, and {rest.name}"
        self._way, self._sizes, self._rest = way, tuple(sizes), rest

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        done, rows = 0, x.shape[0]
        for size in self._sizes:
            while rows - done >= size:
                here = slice(done, done + size)
                self._way(weight, x[here], out[here])
                done += size
        if done < rows:
            self._rest(weight, x[done:], out[done:])


def silu_mul(both: Tensor, out: Tensor) -> None:
    """out `[rows, width]` = silu(gate) * up of both `[rows, 2 * width]`, as the epilogue computes it."""
    count = out.numel()
    _silu_mul()((-(-count // _BLOCK),), both, out, count, out.shape[1])


@functools.cache
def _silu_mul() -> Launch:
    return Launch(kernel=silu_mul_kernel, constants={"BLOCK": _BLOCK}, num_warps=4)
