"""What attention launches in a step, for proofs and rooflines (bench/gpu_kernels.py).

Owns what such a launch reads, writes and multiplies. Knows nothing of what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from common.engine.devices.cuda.attention import SPLIT, Attention
from common.engine.devices.cuda.launch import Work
from common.engine.devices.device import HeadShape

MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}  # A100, RTX 4090, H100, B200, RTX 5090
_ALIGNED = frozenset({"row_elements", "slab_elements", "keys", "values"})
_NUMBERS = (*("i32",) * 7, "fp32", "fp32")
_KINDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def works(
    shape: HeadShape, block_size: int, dtype: torch.dtype, target: int, *, every: bool
) -> Iterator[Work]:
    """A layer's launches with 64 sequences of 4,096 positions that generate, and that verify four drafts; and
    with a prompt of 2,048 positions after as many. In other types than bfloat16 one of them, on one card,
    unless `every`: the rest is made of the same functions."""
    of = _works(shape, block_size, dtype, target)
    if every or dtype == torch.bfloat16 or target == 80:
        yield of.generated(64, 5, 4096)
    if every or dtype == torch.bfloat16:
        yield of.store(2048)
        yield of.list_work(64)
        yield of.generated(64, 1, 4096)
        yield of.combine(64, 4096)
        yield of.prompt(2048, 4096)
        narrow = _works(shape, block_size, dtype, target, torch.float8_e4m3fn)
        yield narrow.store(2048)
        yield narrow.generated(64, 1, 4096)
        yield narrow.prompt(2048, 4096)


def _works(
    shape: HeadShape, block_size: int, dtype: torch.dtype, target: int, kv_dtype: torch.dtype | None = None
) -> _Works:
    count = MULTIPROCESSORS[target]
    return _Works(
        Attention(shape, dtype, block_size, capability=target, multiprocessors=count, kv_dtype=kv_dtype)
    )


class _Works:
    def __init__(self, attention: Attention) -> None:
        self._attention, self._shape = attention, attention.shape
        self._kind, self._size = _KINDS[attention.dtype], attention.dtype.itemsize
        self._is_wide = attention.dtype == torch.float32
        self._pool, self._stored, self._suffix = self._kind, self._shape.head_dim * self._size, ""
        if attention.kv_dtype is not None:
            self._pool, self._stored = "*u8", self._shape.head_dim + 2  # its scale with it
            self._suffix = f" {str(attention.kv_dtype).removeprefix('torch.')}"

    def store(self, rows: int) -> Work:
        shape, kind = self._shape, self._kind
        heads = shape.num_heads + 2 * shape.num_kv_heads
        return Work(
            name=f"rope_store {rows}{self._suffix}",
            launch=self._attention.store_launch(True),
            types=(kind, "*i64", "*i64", self._pool, "*fp32", "*fp32", kind, kind, *("i32",) * 6, "fp32"),
            multiples=_ALIGNED,
            num_programs=self._attention.store_grid(rows)[0] * self._attention.store_grid(rows)[1],
            num_bytes=rows
            * (
                (heads + shape.num_heads) * shape.head_dim * self._size
                + 2 * shape.num_kv_heads * self._stored
                + 4 * shape.rotary_dim
                + 16
            ),
        )

    def list_work(self, tiles: int) -> Work:
        return Work(
            name=f"list_work {tiles}",
            launch=self._attention.list_launch(tiles),
            types=(*("*i32",) * 4, *("i32",) * 4),
            num_programs=tiles,
            num_bytes=tiles * 16 * 2,
        )

    def generated(self, sequences: int, rows: int, positions: int) -> Work:
        """`rows` rows of each sequence: queries, keys and values are read once, partial results written."""
        shape = self._shape
        lines = sequences * shape.num_heads * rows
        tiling = self._attention.generated_tiling(rows)
        return Work(
            name=f"attention generated {sequences}x{rows} of {positions}{self._suffix}",
            launch=self._attention.generated_launch(rows),
            types=(self._kind, self._pool, *("*i32",) * 3, "*fp32", "*fp32", *_NUMBERS),
            multiples=_ALIGNED,
            num_programs=self._attention.multiprocessors * tiling.at_once,
            num_bytes=sequences * self._read(positions)
            + lines * shape.head_dim * self._size
            + _partial_bytes(lines, positions, shape.head_dim),
            flops=4 * lines * positions * shape.head_dim,
            may_fuse=self._is_wide,
        )

    def combine(self, rows: int, positions: int) -> Work:
        shape = self._shape
        lines = rows * shape.num_heads
        return Work(
            name=f"attention combine {rows} of {positions}",
            launch=self._attention.combine_launch(1),
            types=("*fp32", "*fp32", "*i32", self._kind),
            num_programs=rows * shape.num_kv_heads,
            num_bytes=lines * shape.head_dim * self._size + _partial_bytes(lines, positions, shape.head_dim),
        )

    def prompt(self, rows: int, positions: int) -> Work:
        """The last `rows` of so many positions."""
        shape, most_rows = self._shape, self._attention.query_rows
        seen = rows * positions - rows * (rows - 1) // 2  # by all rows
        return Work(
            name=f"attention prompt {rows} of {positions}{self._suffix}",
            launch=self._attention.prompt_launch(most_rows),
            types=(self._kind, self._pool, *("*i32",) * 2, self._kind, *_NUMBERS),
            multiples=_ALIGNED,
            num_programs=-(-rows // most_rows) * shape.num_kv_heads,
            num_bytes=self._read(positions) + 2 * rows * shape.num_heads * shape.head_dim * self._size,
            flops=4 * seen * shape.num_heads * shape.head_dim,
            may_fuse=self._is_wide,
        )

    def _read(self, positions: int) -> int:
        return 2 * positions * self._shape.num_kv_heads * self._stored


def _partial_bytes(lines: int, positions: int, head_dim: int) -> int:
    return lines * -(-positions // SPLIT) * (head_dim + 2) * 4
