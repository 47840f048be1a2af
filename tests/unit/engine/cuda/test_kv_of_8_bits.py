"""Keys and values in 8 bits by the GPU's kernels, interpreted: what the definition says, bit for bit."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.engine.devices.cuda.attention import Attention, Segment
from common.engine.devices.device import HeadShape
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.scaled_rows import TOP_EXPONENTS, scaled
from common.kv_layout import KVLayout
from tests.support.paged import Case, Paged, Run

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
BLOCK_SIZE, NUM_KV_HEADS = 8, 2
EPS = 1e-6


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def rows_of(kv_dtype: torch.dtype, dtype: torch.dtype, head_dim: int) -> Tensor:
    """Rows that have in them what is special in either type, `[rows, head_dim]`."""
    generator = torch.Generator().manual_seed(head_dim)
    info, top = torch.finfo(dtype), 2.0 ** TOP_EXPONENTS[kv_dtype]
    rows = torch.randn(16, head_dim, generator=generator)
    rows[1] *= 2.0**-9
    rows[2] *= torch.logspace(0, -7, head_dim)  # down to zero in the format
    rows[3] = 0.0
    rows[4] = -0.0
    rows[5] = info.smallest_normal * torch.linspace(-1, 1, head_dim)  # subnormal, most of them
    rows[6, 3] = info.max
    rows[7, :2] = torch.tensor([-info.max, info.max])
    rows[8, 0], rows[9, -1], rows[10, head_dim // 2] = math.nan, math.inf, -math.inf
    every = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    every = every[every.isfinite()]
    halves = (every[1:] + every[:-1]) / 2  # ties
    for row, numbers in zip(
        (11, 12, 13, 14), (every[:64], every[64:128], halves[:64], halves[64:128]), strict=True
    ):
        rows[row, 1 : 1 + len(numbers)] = numbers[: head_dim - 1]
        rows[row, 0] = 1.75 * top
    rows[15, 0] = 1.75 * (1 + info.eps)  # just beyond a power of two times the largest number
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32)])
def test_the_bytes_that_are_stored_are_those_of_the_definition(
    kv_dtype: torch.dtype, dtype: torch.dtype, head_dim: int, rotary_dim: int
) -> None:
    shape = HeadShape(2, NUM_KV_HEADS, head_dim, rotary_dim, 0)
    attention = Attention(shape, dtype, BLOCK_SIZE, capability=90, multiprocessors=1, kv_dtype=kv_dtype)
    layout = KVLayout.paged_attention(
        num_layers=2,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        dtype=str(kv_dtype).removeprefix("torch."),
    )
    cache = KVCache(layout, 4, torch.full((4, layout.slab_bytes), 0xA5, dtype=torch.uint8))
    before = cache.slabs.clone()
    rows = rows_of(kv_dtype, dtype, head_dim)
    count = len(rows)
    heads = torch.stack((rows, rows.roll(1, 0), rows, rows.roll(2, 0), rows.roll(3, 0), rows.roll(5, 0)), 1)
    slots = torch.tensor([31 - row if row != 1 else -1 for row in range(count)])
    positions = torch.zeros(count, dtype=torch.int64)
    rope = torch.ones(1, rotary_dim // 2), torch.zeros(1, rotary_dim // 2)
    with np.errstate(invalid="ignore"):  # where infinity is turned by nothing
        attention.store(heads.flatten(1).clone(), positions, slots, Segment.of(cache, 1), rope, None, EPS)

    stored = slots >= 0
    at = slots[stored] // BLOCK_SIZE, slots[stored] % BLOCK_SIZE
    untouched = torch.ones(4, BLOCK_SIZE, dtype=torch.bool)
    untouched[at] = False
    for kind, first in (("k", 2), ("v", 4)):
        wanted, scales = scaled(heads[stored, first : first + 2], kv_dtype)
        found, found_scales = cache.view(1, kind), cache.scales(1, kind)
        assert found_scales is not None
        here = found.view(torch.uint8)[at]
        is_sound = scales.isfinite()
        assert 0 < int(is_sound.sum()) < is_sound.numel()
        if kind == "k":  # to turn by nothing makes a plus of a minus zero
            wanted = wanted.float().add(0.0).to(kv_dtype)
            here = torch.where(here == 0x80, 0, here)
        assert torch.equal(here[is_sound], wanted.view(torch.uint8)[is_sound])
        assert bool((here[~is_sound] == 0x7F).all())
        assert torch.equal(bits(found_scales[at][is_sound]), bits(scales[is_sound]))
        assert found_scales[at][~is_sound].isnan().all()
        assert bool((found.view(torch.uint8)[untouched] == 0xA5).all())
        cache.view(1, kind).view(torch.uint8)[at], found_scales.view(torch.uint8)[...] = 0xA5, 0xA5
    assert torch.equal(cache.slabs, before)  # nothing else was written


RUNS = [Run(0, 138, 140), Run(1, 69, 70)]
CASES = [
    Case(kv_dtype=E4M3),
    Case(group=3, kv_heads=2, head_dim=80, block_size=8, window=37, kv_dtype=E5M2),
    Case(head_dim=32, dtype=FLOAT16, soft_cap=3.0, kv_dtype=E4M3),
    Case(head_dim=32, dtype=FLOAT32, kv_dtype=E5M2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_of_the_rows_that_are_read_back(case: Case, exact_products: None) -> None:
    """In the type that is computed in, bit for bit, by either kernel."""
    assert case.kv_dtype is not None
    paged = Paged(case, (140, 70))
    exact = paged.read_back(case.kv_dtype)
    exact.case = dataclasses.replace(case, kv_dtype=None)
    wanted = exact.attend(RUNS)
    for prompt in (False, True):
        found = paged.attend(RUNS, prompt=prompt)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.equal(wanted[0], Paged(exact.case, (140, 70)).attend(RUNS)[0])


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2], ids=str)
def test_every_code_is_read_as_the_number_it_is(kv_dtype: torch.dtype) -> None:
    """A row that sees one position has its value."""
    numbers = torch.arange(256, dtype=torch.uint8)[
        torch.arange(256, dtype=torch.uint8).view(kv_dtype).float().isfinite()
    ]
    numbers = torch.nn.functional.pad(numbers, (0, 256 - len(numbers)))
    attention = Attention(
        HeadShape(1, 1, 256, 256, 0), BFLOAT16, 1, capability=90, multiprocessors=1, kv_dtype=kv_dtype
    )
    for exponent in (-100, -1, 0, 7, 127 - TOP_EXPONENTS[kv_dtype]):
        scale = torch.tensor([2.0**exponent], dtype=BFLOAT16)
        slab = torch.cat((torch.zeros(256, dtype=torch.uint8), numbers, scale.view(torch.uint8).repeat(2)))
        out = torch.empty(1, 256, dtype=BFLOAT16)
        attention.prompt(
            torch.zeros(1, 3 * 256, dtype=BFLOAT16),
            torch.tensor([[0, 1, 0, 0]], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            Segment(slab[None], 0, 256, 256, 257),
            out,
            1,
        )
        assert torch.equal(out[0].double(), numbers.view(kv_dtype).double() * 2.0**exponent)


@pytest.mark.parametrize("prompt", [False, True])
def test_a_row_that_is_not_finite_reaches_only_rows_that_see_it(prompt: bool, exact_products: None) -> None:
    paged, run = Paged(Case(kv_dtype=E4M3), (80,)), Run(0, 64, 73)
    sound, spoiled = (paged.attend([run], prompt=prompt, bad=bad)[0] for bad in ((), [(0, 66)]))
    assert torch.equal(spoiled[:2], sound[:2])
    assert spoiled[2:].isnan().all()
