"""How a product is launched: what belongs to the weight and decides its bits, and what does not.

Owns the order of a weight's sums, and the handful of launches that compute it for each bucket of rows, the
likely best first. Which of them is taken is for whoever times them (tuning.py), whether it keeps the order
for whoever proves it (settling.py). Knows no tensor.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

from common.engine.devices.cuda.kernels.products import product_kernel
from common.engine.devices.cuda.launch import Launch, Work

# Rows that share a launch: up to each of these, and one more for all that are larger.
BUCKETS = (16, 32, 64, 128, 256)
NARROWEST_TILE = 64  # rows of a weight: what one instruction of a warp group takes on 9.0
PROGRAMS_A_MULTIPROCESSOR = 2  # at least, of few rows: what keeps memory busy
FEWEST_STEPS = 8  # of a range, lest its sums cost more than they save
MOST_SPLITS = 8


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A weight's, as kernels see it. `gated`: it has `2 * out_features` rows, gate over up."""

    out_features: int
    in_features: int
    gated: bool
    biased: bool

    @property
    def weight_rows(self) -> int:
        return self.out_features * (2 if self.gated else 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """Of a weight's sums: its columns lie in `splits` ranges of whole `block_k`."""

    splits: int
    block_k: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """What leaves no trace in the bits: `block_n` rows of the weight by `block_m` rows of activations.

    `parallel`: ranges go to programs of their own. `persistent`: programs that take tiles in turn, this many
    on a multiprocessor; 0 is one for each tile.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    parallel: bool = False
    persistent: int = 0

    @property
    def name(self) -> str:
        how = ", parallel" if self.parallel else f", {self.persistent} persistent" if self.persistent else ""
        return f"{self.block_n}x{self.block_m}, {self.num_warps} warps, {self.num_stages} stages{how}"

    def tiles(self, shape: Shape, rows: int) -> int:
        return -(-shape.weight_rows // self.block_n) * -(-rows // self.block_m)

    def programs(self, shape: Shape, order: Order, rows: int, multiprocessors: int) -> int:
        tiles = self.tiles(shape, rows)
        if self.parallel:
            return tiles * order.splits
        return min(tiles, multiprocessors * self.persistent) if self.persistent else tiles

    def partials(self, shape: Shape, order: Order, rows: int) -> int:
        """How many numbers of float32 a launch leaves for its last programs."""
        return self.tiles(shape, rows) * order.splits * self.block_n * self.block_m if self.parallel else 0


def order_of(shape: Shape, multiprocessors: int, size: int) -> Order:
    """A constant of the weight on a card, for an element of `size` bytes: as few ranges as keep all
    multiprocessors busy with 16 rows. Never by the number of rows."""
    block_k = 64 if size == 2 else 32
    tiles = -(-shape.weight_rows // NARROWEST_TILE)
    steps = -(-shape.in_features // block_k)
    wanted = -(-multiprocessors * PROGRAMS_A_MULTIPROCESSOR // tiles)
    splits = max(1, min(wanted, steps // FEWEST_STEPS, MOST_SPLITS))
    of_a_range = -(-steps // splits)
    return Order(-(-steps // of_a_range), block_k)  # no range is empty


def bucket_of(rows: int) -> int:
    """The place in `BUCKETS` of the launch for so many rows; `len(BUCKETS)` beyond the last."""
    return bisect.bisect_left(BUCKETS, rows)


def candidates(order: Order, bucket: int, size: int) -> tuple[Tile, ...]:
    """Launches for a bucket, the likely best first."""
    found = _wide(bucket) if size == 4 else _narrow(bucket, order.splits)
    if order.splits == 1:
        return tuple(dict.fromkeys(dataclasses.replace(tile, parallel=False) for tile in found))
    return found


def _narrow(bucket: int, splits: int) -> tuple[Tile, ...]:
    """16-bit types, on tensor cores. All fit into the 99 KB of shared memory that 8.6, 8.9 and 12.0 have."""
    if bucket == 0:
        return (Tile(64, 16, 4, 6, parallel=True), Tile(64, 16, 4, 8, True), Tile(128, 16, 4, 4, True))
    if bucket == 1:
        return (Tile(64, 32, 4, 6, parallel=True), Tile(64, 32, 4, 4, True), Tile(128, 32, 4, 4, True))
    if bucket == 2:
        return (Tile(64, 64, 4, 5, parallel=True), Tile(128, 64, 8, 4, True), Tile(128, 64, 8, 4))
    if bucket == 3:
        return (Tile(128, 128, 8, 3, parallel=True), Tile(64, 128, 8, 3, True), Tile(128, 128, 8, 3))
    if bucket == 4:
        return (Tile(128, 128, 8, 3, parallel=True), Tile(128, 128, 8, 3), Tile(64, 128, 8, 3))
    square = (Tile(128, 128, 8, 4, persistent=1), Tile(128, 128, 8, 3))
    if splits > 1:  # two accumulators, of 128 registers each at 256 columns, are too many
        return square
    return (Tile(128, 256, 8, 3, persistent=1), Tile(128, 256, 8, 3), *square)


def _wide(bucket: int) -> tuple[Tile, ...]:
    """float32, which tensor cores do not multiply without rounding it first."""
    block_m = min(64, BUCKETS[min(bucket, 2)])
    return (Tile(64, block_m, 4 if block_m < 64 else 8, 2, parallel=bucket < 3),)


@functools.cache
def launch(shape: Shape, order: Order, tile: Tile) -> Launch:
    return _launch(shape.gated, shape.biased, shape.in_features % order.block_k == 0, order, tile)


@functools.cache
def _launch(gated: bool, biased: bool, whole: bool, order: Order, tile: Tile) -> Launch:
    return Launch(
        kernel=product_kernel,
        constants={
            "GATED": gated,
            "BIASED": biased,
            "SPLITS": order.splits,
            "PARALLEL": tile.parallel,
            "WHOLE": whole,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": order.block_k,
            "GROUP": 8,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def work(name: str, shape: Shape, rows: int, kind: str, size: int, multiprocessors: int) -> Work:
    """The product of `rows` rows as it is launched where nothing is timed; `kind` is triton's word for the
    type, of `size` bytes."""
    order = order_of(shape, multiprocessors, size)
    tile = candidates(order, bucket_of(rows), size)[0]
    strides = frozenset({"depth", "x_stride", "weight_stride"} if shape.in_features % 16 == 0 else ())
    width = frozenset({"width"} if shape.out_features % 16 == 0 else ())
    return Work(
        name=f"product {name} {rows}x{shape.weight_rows}x{shape.in_features}",
        launch=launch(shape, order, tile),
        types=(f"*{kind}",) * 4 + ("*fp32", "*i32") + ("i32",) * 5,
        multiples=strides | width,
        num_programs=tile.programs(shape, order, rows, multiprocessors),
        num_bytes=size
        * (shape.weight_rows * shape.in_features + rows * (shape.in_features + shape.out_features)),
        flops=2 * rows * shape.weight_rows * shape.in_features,
        may_fuse=size == 4,
    )
