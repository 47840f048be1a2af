"""Attention on the CPU: what a row computes is right, and a function of its position alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.engine.devices.cpu import attention, kernels, numba_runtime, scaled_rows, tiles
from common.engine.devices.cpu.products import ELEMENT
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.scaled_rows import scaled, unscaled
from common.kv_layout import KVLayout

NOWHERE = float("nan")  # what lies in blocks that nobody holds, and beyond a sequence's end


@dataclasses.dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int = 0
    length: int = 300


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SMALL = Case(8, 4, 8)  # as of the models that other tests run: its kernel is compiled for them, too
GROUP = Case(14, 2, 64)
CASES = [
    (GROUP, BFLOAT16),
    (dataclasses.replace(GROUP, window=200, block_size=64), BFLOAT16),
    *((SMALL, dtype) for dtype in (BFLOAT16, FLOAT32)),
    *((dataclasses.replace(SMALL, window=37, block_size=5), dtype) for dtype in (BFLOAT16, FLOAT32)),
    (dataclasses.replace(SMALL, window=1, block_size=1, length=140), BFLOAT16),
    (dataclasses.replace(SMALL, window=129, block_size=3), BFLOAT16),
    (Case(25, 1, 8, length=140), FLOAT32),  # lines of one position in three parts
]
OTHERS = [  # shapes that are compiled for these tests alone
    (Case(4, 4, 64, window=100), BFLOAT16),
    (Case(6, 3, 64, block_size=5, window=37), FLOAT32),
    (Case(4, 1, 32, block_size=3), FLOAT32),
    (Case(16, 1, 80, window=200), BFLOAT16),
    (Case(2, 2, 4, block_size=1, window=1, length=140), BFLOAT16),
    (Case(3, 1, 128, block_size=64, window=129), BFLOAT16),
    (Case(5, 1, 256), FLOAT32),
]


class Paged:
    """Queries, keys and values of one sequence in a paged pool whose other cells are NaN."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.qkv = normal(case.length, (case.heads + 2 * case.kv_heads) * case.head_dim)
        self.keys = normal(case.length, case.kv_heads, case.head_dim)
        self.values = normal(case.length, case.kv_heads, case.head_dim)
        num_blocks = -(-case.length // case.block_size)
        self.table = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].to(torch.int32)

    def pool(self) -> Tensor:
        case = self.case
        shape = (len(self.table) + 3, 2, case.block_size, case.kv_heads, case.head_dim)
        pool = torch.full(shape, NOWHERE, dtype=self.dtype)
        for position in range(case.length):
            block = self.table[position // case.block_size]
            pool[block, 0, position % case.block_size] = self.keys[position]
            pool[block, 1, position % case.block_size] = self.values[position]
        return pool

    def scaled_pool(self, dtype: torch.dtype) -> KVCache:
        """Of the same keys and values, in 8 bits."""
        case = self.case
        layout = KVLayout.paged_attention(
            num_layers=1,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            dtype=str(dtype).removeprefix("torch."),
        )
        blocks = len(self.table) + 3
        cache = KVCache(layout, blocks, torch.zeros(blocks, layout.slab_bytes, dtype=torch.uint8))
        cache.poison(range(blocks))
        for position in range(case.length):
            block, at = self.table[position // case.block_size], position % case.block_size
            for kind, rows in (("k", self.keys), ("v", self.values)):
                scales = cache.scales(0, kind)
                assert scales is not None
                cache.view(0, kind)[block, at], scales[block, at] = scaled(rows[position], dtype)
        return cache

    def attend(
        self, runs: Sequence[tuple[int, int]], workers: int = 1, cache: KVCache | None = None
    ) -> Tensor:
        """Rows `[first, end)` of each run, one after the other, in tiles as they are; of keys and values in
        8 bits where a `cache` is given."""
        case, pool = self.case, self.pool()
        places: tuple[Any, ...] = (
            pool.data_ptr(),
            0,
            pool.stride(1) * pool.itemsize,
            pool.stride(0) * pool.itemsize,
        )
        scales: tuple[Any, ...] = (0, 0, scaled_rows.PLAIN)
        if cache is not None:
            offsets = (cache.offset_bytes(0, "k"), cache.offset_bytes(0, "v"))
            places = (cache.slabs.data_ptr(), *offsets, cache.layout.slab_bytes)
            form = scaled_rows.FORMATS[cache.view(0, "k").dtype]
            scales = (cache.offset_bytes(0, "k_scale"), cache.offset_bytes(0, "v_scale"), form)
        rows = torch.cat([self.qkv[first:end] for first, end in runs])
        starts = itertools.accumulate((end - first for first, end in runs), initial=0)
        of = [(row, end - first, first, 0) for row, (first, end) in zip(starts, runs, strict=False)]
        tile_of = torch.tensor(of, dtype=torch.int32)
        out = torch.full((len(rows), case.heads * case.head_dim), NOWHERE, dtype=self.dtype)
        attention.attend(
            rows.data_ptr(),
            rows.shape[1],
            out.data_ptr(),
            self.table.data_ptr(),
            tile_of.data_ptr(),
            len(runs),
            *places,
            case.block_size,
            case.heads,
            case.kv_heads,
            case.window,
            case.head_dim**-0.5 * attention.LOG2_E,
            workers,
            *attention.together(case.heads // case.kv_heads, case.head_dim),
            (0,) * (case.head_dim // 4),
            tiles.PAIR_PRODUCTS,
            *scales,
            ELEMENT[self.dtype],
        )
        return out

    def expected(self) -> Tensor:
        """All rows in float64."""
        case = self.case
        queries = self.qkv[:, : case.heads * case.head_dim].double().view(case.length, case.heads, -1)
        group = case.heads // case.kv_heads
        keys, values = (x.double().repeat_interleave(group, 1) for x in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * case.head_dim**-0.5
        distance = torch.arange(case.length)[:, None] - torch.arange(case.length)
        is_seen = (distance >= 0) & ((distance < case.window) if case.window else True)
        weights = torch.softmax(scores.masked_fill(~is_seen, -torch.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)

    def seen_by(self, position: int) -> range:
        """The rows that read a position."""
        end = position + self.case.window if self.case.window else self.case.length
        return range(position, min(end, self.case.length))


def in_tiles(length: int, size: int = attention.QUERY_TILE) -> list[tuple[int, int]]:
    return [(first, min(first + size, length)) for first in range(0, length, size)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    numba_runtime.set_num_threads(1)


@pytest.mark.parametrize(
    ("case", "dtype"), [*CASES, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_every_row_is_right_and_the_same_bits_however_rows_are_cut(case: Case, dtype: torch.dtype) -> None:
    sequence = Paged(case, dtype)
    whole = sequence.attend(in_tiles(case.length))
    expected = sequence.expected()
    tolerance = 2e-6 if dtype == torch.float32 else 0.012
    assert (whole.double() - expected).abs().max() < tolerance * max(1.0, float(expected.abs().max()))
    alone = [(row, row + 1) for row in range(case.length)]
    assert torch.equal(sequence.attend(alone), whole)
    cuts = sorted({0, case.length, *np.random.default_rng(1).integers(1, case.length, 17).tolist()})
    assert torch.equal(sequence.attend(list(itertools.pairwise(cuts))), whole)


@pytest.mark.parametrize("case", [SMALL, GROUP], ids=str)
def test_threads_leave_no_trace(case: Case) -> None:
    sequence = Paged(case, torch.bfloat16)
    numba_runtime.set_num_threads(2)
    runs = [*in_tiles(case.length), (7, 8), (200, 203)]
    two = sequence.attend(runs, workers=2)
    numba_runtime.set_num_threads(1)
    assert torch.equal(sequence.attend(runs), two)


@pytest.mark.parametrize(("case", "dtype"), CASES[:6], ids=str)
@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(
    case: Case, dtype: torch.dtype, of: str, number: float
) -> None:
    right = Paged(case, dtype).attend(in_tiles(case.length))
    for position in (0, 40, 127, 128, case.length - 1):
        spoiled = Paged(case, dtype)
        (spoiled.keys if of == "keys" else spoiled.values)[position] = number
        found = spoiled.attend(in_tiles(case.length))
        rows = spoiled.seen_by(position)
        others = [row for row in range(case.length) if row not in rows]
        assert torch.equal(found[others], right[others])
        if of == "values" or number != number:  # an infinite key may make a score of minus infinity
            assert not found[list(rows)].isfinite().any()


def test_a_score_far_below_the_highest_weighs_nothing() -> None:
    case = dataclasses.replace(SMALL, length=200)
    sequence = Paged(case, torch.float32)
    sequence.qkv[:] = 1.0
    sequence.keys[:] = -100.0
    sequence.keys[150] = 1.0
    found = sequence.attend(in_tiles(case.length))
    assert torch.equal(found[199].view(4, 2, 8), sequence.values[150][:, None].expand(4, 2, 8))
    assert found.isfinite().all()


@pytest.mark.parametrize("case", [SMALL], ids=str)
def test_a_processor_without_products_of_pairs_widens_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "PAIR_PRODUCTS", ())
    sequence = Paged(case, torch.bfloat16)
    whole = sequence.attend(in_tiles(case.length))
    assert (whole.double() - sequence.expected()).abs().max() < 0.05
    assert torch.equal(sequence.attend([(row, row + 1) for row in range(case.length)]), whole)


@pytest.mark.parametrize("group", range(1, 130))
def test_lines_that_are_computed_together_fit_the_registers(group: int) -> None:
    for head_dim in (4, 64, 80, 128, 256):
        few, many, columns = map(len, attention.together(group, head_dim))
        assert few <= many <= 24 // columns
        assert many % few == 0
        assert few * -(-group // few) - group < few, "as few lines of zeros as can be"


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_one_key_has_all_the_weight_however_large_its_score(dtype: torch.dtype) -> None:
    """A score is finite, and so is what a row computes of it."""
    paged = Paged(dataclasses.replace(SMALL, length=1), dtype)
    paged.qkv *= 1e6
    paged.keys *= 1e6
    assert torch.equal(paged.attend([(0, 1)]), paged.expected().to(dtype))


SCALED_CASES = [
    pytest.param(GROUP, BFLOAT16, torch.float8_e4m3fn, marks=pytest.mark.slow),
    (dataclasses.replace(SMALL, window=37, block_size=5), BFLOAT16, torch.float8_e5m2),
    (dataclasses.replace(SMALL, window=37, block_size=5), FLOAT32, torch.float8_e4m3fn),
    (SMALL, FLOAT32, torch.float8_e5m2),
    (SMALL, BFLOAT16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("case", "dtype", "stored"), SCALED_CASES, ids=str)
def test_rows_of_8_bits_have_the_bits_of_attention_to_what_is_read_back(
    case: Case, dtype: torch.dtype, stored: torch.dtype
) -> None:
    sequence = Paged(case, dtype)
    cache = sequence.scaled_pool(stored)
    sequence.keys, sequence.values = (
        unscaled(*scaled(rows, stored)).to(dtype) for rows in (sequence.keys, sequence.values)
    )
    plain = sequence.attend(in_tiles(case.length))
    assert not plain.isnan().any()
    for runs in (in_tiles(case.length), [(row, row + 1) for row in range(case.length)]):
        assert torch.equal(sequence.attend(runs, cache=cache), plain)


@pytest.mark.parametrize("kind", ["k", "v", "k_scale", "v_scale"])
def test_nan_of_8_bits_or_of_a_scale_reaches_those_who_see_it_and_nobody_else(kind: str) -> None:
    case = dataclasses.replace(SMALL, window=37, block_size=5)
    sequence = Paged(case, BFLOAT16)
    cache = sequence.scaled_pool(torch.float8_e4m3fn)
    right = sequence.attend(in_tiles(case.length), cache=cache)
    position, head = 133, 2
    block, at = sequence.table[position // case.block_size], position % case.block_size
    cache.view(0, kind)[block, at, head].view(-1)[-1] = torch.nan
    found = sequence.attend(in_tiles(case.length), cache=cache).view(case.length, case.heads, -1)
    seen = list(sequence.seen_by(position))
    readers = [head * case.heads // case.kv_heads + i for i in range(case.heads // case.kv_heads)]
    expected = torch.zeros(case.length, case.heads, dtype=torch.bool)
    for reader in readers:
        expected[seen, reader] = True
    assert torch.equal(found.isnan().any(-1), expected)
    others = ~expected.repeat_interleave(case.head_dim, 1)
    assert torch.equal(found.flatten(1)[others], right[others])


@pytest.mark.parametrize("stored", list(scaled_rows.FORMATS), ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_what_the_cpu_stores_in_8_bits_is_what_the_definition_says(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Any bits that a float may have, through the kernel that stores keys and values."""
    rows, heads, kv_heads, head_dim, block_size = 200, 4, 2, 8, 4
    generator = torch.Generator().manual_seed(5)
    width = (heads + 2 * kv_heads) * head_dim
    qkv = torch.randint(-(2**31), 2**31, (rows, width), generator=generator, dtype=torch.int64)
    qkv = qkv.to(torch.int32).view(torch.float32)
    qkv[::2] = torch.randn(rows // 2, width, generator=generator)
    qkv[0], qkv[1] = 0.0, torch.finfo(dtype).max
    qkv = qkv.to(dtype)
    layout = KVLayout.paged_attention(
        num_layers=2,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=str(stored).removeprefix("torch."),
    )
    blocks = rows // block_size
    cache = KVCache(layout, blocks, torch.zeros(blocks, layout.slab_bytes, dtype=torch.uint8))
    slots = torch.randperm(rows, generator=generator)
    slots[3] = -1
    positions, angles = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, 0)
    given = qkv.clone()
    kernels.rotate_and_store(
        given.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        angles.data_ptr(),
        angles.data_ptr(),
        0,
        0,
        cache.slabs.data_ptr(),
        cache.offset_bytes(1, "k"),
        cache.offset_bytes(1, "v"),
        layout.slab_bytes,
        block_size,
        rows,
        heads,
        kv_heads,
        head_dim,
        0,
        1e-6,
        cache.offset_bytes(1, "k_scale"),
        cache.offset_bytes(1, "v_scale"),
        scaled_rows.FORMATS[stored],
        ELEMENT[dtype],
    )
    expected = KVCache(layout, blocks, torch.zeros_like(cache.slabs))
    for row in range(rows):
        if slots[row] >= 0:
            both = qkv[row, heads * head_dim :].view(2, kv_heads, head_dim)
            for kind, of_kind in zip(("k", "v"), both, strict=True):
                scales = expected.scales(1, kind)
                assert scales is not None
                block, at = divmod(int(slots[row]), block_size)
                expected.view(1, kind)[block, at], scales[block, at] = scaled(of_kind, stored)
    for kind in ("k", "v"):
        scales = [of.scales(1, kind) for of in (cache, expected)]
        assert scales[0] is not None
        assert scales[1] is not None
        is_nan = scales[1].isnan()
        assert torch.equal(scales[0].isnan(), is_nan)
        assert torch.equal(scales[0][~is_nan], scales[1][~is_nan])
        ours, theirs = (of.view(1, kind).view(torch.uint8)[~is_nan] for of in (cache, expected))
        assert torch.equal(ours, theirs)
        assert cache.view(1, kind)[is_nan].float().isnan().all()
    assert not cache.slabs[:, : cache.offset_bytes(1, "k")].any()
