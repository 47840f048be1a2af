"""Attention's kernels, interpreted: right, and with bits that are a function of a row's position alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from common.engine.devices.cuda.attention import Attention, Segment, check_heads
from common.engine.devices.device import HeadShape
from common.engine.devices.reference.backend import _attend
from common.errors import ConfigError, PdqError, UnsupportedModel
from tests.support.paged import Case, Paged, Run
from tests.support.triton_interpreter import exact_products

__all__ = ["exact_products"]

LENGTHS = (270, 70, 131)  # three splits of 128, a bit more than a step, two splits
RUNS = [Run(0, 268, 270), Run(1, 69, 70), Run(2, 126, 130)]  # the last one crosses a split's border
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
FULL, WINDOW = Case(), Case(group=1, kv_heads=2, head_dim=80, block_size=8, window=37)
CASES = [FULL, WINDOW, Case(group=7, block_size=64, soft_cap=3.0, scale=0.3, dtype=FLOAT16)]
OTHERS = [
    Case(group=3, head_dim=96, scale=0.3, window=129, dtype=FLOAT16),
    Case(group=8, head_dim=128, block_size=32, window=1),
    Case(group=4, head_dim=256, block_size=128, dtype=FLOAT32),
    Case(group=16, head_dim=64, block_size=1, window=64, split=64),
    Case(group=2, head_dim=256, split=256),
]


def tolerance(case: Case) -> float:
    """Weights are rounded to the type of the values; the sums are of numbers around one."""
    return {BFLOAT16: 2e-2, FLOAT16: 3e-3, FLOAT32: 3e-6}[case.dtype]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_rows_equal_float64_and_each_other_by_either_kernel(case: Case, exact_products: None) -> None:
    paged = Paged(case, LENGTHS)
    generated, prompt = paged.attend(RUNS), paged.attend(RUNS, prompt=True)
    for run, mine, other in zip(RUNS, generated, prompt, strict=True):
        torch.testing.assert_close(mine.double(), paged.expected(run), rtol=0, atol=tolerance(case))
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_rows_equal_the_reference_backend(dtype: torch.dtype) -> None:
    case = Case(group=4, dtype=dtype, window=50)
    paged, run = Paged(case, (100,)), Run(0, 98, 100)
    segment, tables, starts = paged.pool([run])
    pool = segment.elements.view(-1, 4, case.block_size, case.kv_heads, case.head_dim).nan_to_num()
    table = tables[starts[0] :]
    wanted = _attend(paged.queries[0][98:100], pool[:, 2], pool[:, 3], table, 98, case.window)
    torch.testing.assert_close(paged.attend([run])[0], wanted, rtol=0, atol=tolerance(case))


@functools.cache
def one_by_one(case: Case) -> list[Tensor]:
    paged = Paged(case, LENGTHS)
    return [paged.attend([run])[0] for run in RUNS]


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 2},  # neighbours that are none
        {"places": 1, "multiprocessors": 1},  # all splits of a tile by one program
        {"places": 5},  # of the shorter tiles only
        {"multiprocessors": 30, "most_rows": 8},  # a program for each item, and room for longer tiles
        {"capability": 90},  # programs of more lines
        {"capability": 90, "prompt": True},
        {"prompt": True, "padding": 1, "most_rows": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [FULL, pytest.param(WINDOW, marks=pytest.mark.slow)], ids=["full", "window"])
def test_a_row_has_the_same_bits_however_it_is_launched(
    case: Case, how: dict[str, int], exact_products: None
) -> None:
    paged = Paged(case, LENGTHS)
    alone = one_by_one(case)
    together = paged.attend(RUNS, **how)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_chunks_of_a_prompt_leave_no_trace(exact_products: None) -> None:
    paged = Paged(Case(window=90), (140,))
    whole = paged.attend([Run(0, 0, 140)], prompt=True)[0]
    for borders in ((0, 64, 140), (0, 1, 127, 129, 140)):
        for first, end in itertools.pairwise(borders):
            mine = paged.attend([Run(0, first, end)], prompt=True)[0]
            assert torch.equal(mine, whole[first:end]), (first, end)


def test_drafts_leave_no_trace_in_the_row_before_them(exact_products: None) -> None:
    """More rows than one program takes, where 16 lines are taken at once and where 64 are."""
    paged = Paged(Case(group=8, soft_cap=2.0), (75,))
    alone = paged.attend([Run(0, 62, 63)])[0]
    for capability in (80, 90):
        verified = paged.attend([Run(0, 62, 72)], capability=capability)[0]
        assert torch.equal(verified[:1], alone)


@pytest.mark.parametrize("window", [0, 4])
def test_what_is_not_finite_reaches_only_rows_that_see_it(window: int, exact_products: None) -> None:
    case, bad = Case(window=window), 66
    paged, run = Paged(case, (100,)), Run(0, 64, 73)
    for prompt in (False, True):
        sound, spoiled = (paged.attend([run], prompt=prompt, bad=b)[0] for b in ((), [(0, bad)]))
        seen = range(bad - run.first, min(bad + window, run.end) - run.first if window else len(sound))
        unseen = [row for row in range(len(sound)) if row not in seen]
        assert not spoiled[list(seen)].isfinite().flatten(1).all(1).any()
        assert torch.equal(spoiled[unseen], sound[unseen])


def test_a_pool_beyond_2_31_elements_is_read_and_written_where_it_should_be() -> None:
    """A sparse file of 8 GiB of which a few pages are touched: block numbers times slabs are 64-bit."""
    case = Case(group=2, head_dim=64, block_size=16)
    segment = case.block_size * case.head_dim
    slab, blocks = 1 << 22, 1 << 10
    file = os.memfd_create("pool")
    os.ftruncate(file, 2 * slab * blocks)
    memory = np.frombuffer(mmap.mmap(file, 0), dtype=np.float16)
    os.close(file)
    pool = torch.from_numpy(memory).view(blocks, slab)
    assert pool.numel() > 2**31
    attention = dataclasses.replace(case, dtype=FLOAT16).attention()
    qkv = torch.randn(1, 4 * case.head_dim, generator=torch.Generator().manual_seed(0)).half()
    block = blocks - 1
    place = Segment(pool, slab - 2 * segment, slab - segment)
    rope = torch.ones(1, case.head_dim // 2), torch.zeros(1, case.head_dim // 2)
    zero = torch.zeros(1, dtype=torch.int64)
    attention.store(qkv, zero, zero + block * case.block_size, place, rope, None, 1e-6)
    assert torch.equal(
        pool[block, place.keys :][: case.head_dim], qkv[0, 2 * case.head_dim :][: case.head_dim]
    )
    tile, table = torch.tensor([[0, 1, 0, 0]], dtype=torch.int32), torch.tensor([block], dtype=torch.int32)
    out = torch.empty(1, 2 * case.head_dim, dtype=FLOAT16)
    attention.prompt(qkv, tile, table, place, out, 1)
    assert torch.equal(out.view(2, -1), qkv[0, 3 * case.head_dim :].expand(2, -1))  # it sees itself alone


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))]
)
def test_any_list_of_tiles_gives_each_row_its_own_bits(seed: int, exact_products: None) -> None:
    chance = random.Random(seed)
    case = Case(
        group=chance.choice([1, 2, 3, 4, 8]),
        kv_heads=chance.choice([1, 2]),
        head_dim=32,
        block_size=chance.choice([1, 8, 16, 64]),
        window=chance.choice([0, 1, 30, 64, 100, 200]),
        split=chance.choice([64, 128]),
    )
    lengths = [chance.randint(1, 200) for _ in range(3)]
    paged = Paged(case, lengths, seed)
    runs = []
    for sequence, length in enumerate(lengths):
        first = chance.randrange(length)
        runs.append(Run(sequence, first, min(length, first + chance.randint(1, 5))))
    alone = [paged.attend([run], prompt=True)[0] for run in runs]
    chance.shuffle(order := list(range(3)))
    together = paged.attend(
        [runs[i] for i in order],
        padding=chance.choice([0, 1]),
        places=chance.choice([0, 1, 7]),
        multiprocessors=chance.choice([1, 3]),
        capability=chance.choice([80, 90]),
    )
    for place, i in enumerate(order):
        assert torch.equal(together[place], alone[i]), runs[i]
        torch.testing.assert_close(alone[i].double(), paged.expected(runs[i]), rtol=0, atol=tolerance(case))


GOOD = HeadShape(num_heads=8, num_kv_heads=2, head_dim=128, rotary_dim=128, window=0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"head_dim": 512}, "head_dim"),
        ({"head_dim": 100, "rotary_dim": 100}, "head_dim"),
        ({"rotary_dim": 63}, "rotary_dim"),
        ({"rotary_dim": 130}, "rotary_dim"),
        ({"num_kv_heads": 3}, "num_key_value_heads"),
        ({"window": -1}, "sliding_window"),
    ],
)
def test_heads_that_do_not_fit_are_named(change: dict[str, int], param: str) -> None:
    check_heads(GOOD)
    with pytest.raises(UnsupportedModel) as raised:
        check_heads(dataclasses.replace(GOOD, **change))
    assert raised.value.param == param


def test_a_block_size_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        Attention(GOOD, BFLOAT16, 24, capability=90, multiprocessors=1)
    assert isinstance(raised.value, PdqError)
    assert raised.value.param == "block_size"
