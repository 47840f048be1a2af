"""How large a pool is on a device with memory of its own, and what an operator reads if it does not fit."""

from __future__ import annotations

import dataclasses

import pytest

from common.engine.runner.buckets import Buckets
from common.engine.runner.pool_plan import GRAPH_BYTES, LINK_BYTES, Needs, blocks_of_pool
from common.errors import InsufficientMemory
from common.settings.config import EngineSettings

GIB = 1 << 30
SLAB = 2 << 20
NEEDS = Needs(weights=16 * GIB, steps=3 * GIB, bucket=GIB, graphs=30, shared=True)
LATER = GIB + GIB // 4 + 30 * GRAPH_BYTES + LINK_BYTES


def blocks(left: int, needs: Needs = NEEDS, useful: int = 1 << 30, **settings: int) -> int:
    return blocks_of_pool(EngineSettings(**settings), left, needs, SLAB, useful)  # type: ignore[arg-type]


def test_a_pool_takes_what_graphs_and_links_leave() -> None:
    assert NEEDS.later == LATER
    assert blocks(LATER + 50 * GIB) == 50 * GIB // SLAB
    assert blocks(LATER + 50 * GIB - 1) == 50 * GIB // SLAB - 1


def test_it_takes_no_more_than_all_sequences_can_use() -> None:
    assert blocks(80 * GIB, useful=100) == 100


def test_without_graphs_or_other_processes_nothing_is_kept_for_them() -> None:
    alone = dataclasses.replace(NEEDS, graphs=0, shared=False)
    assert alone.later == 0
    assert blocks(4 * SLAB, alone) == 4


@pytest.mark.parametrize(
    ("setting", "value"), [("num_kv_blocks", 100), ("kv_cache_memory_bytes", 100 * SLAB + 5)]
)
def test_a_size_that_is_set_is_taken_where_it_fits(setting: str, value: int) -> None:
    assert blocks(LATER + 100 * SLAB, **{setting: value}) == 100
    with pytest.raises(InsufficientMemory, match=f"lower --{setting.replace('_', '-')}") as refused:
        blocks(LATER + 100 * SLAB - 1, **{setting: value})
    assert refused.value.param == setting


def test_a_size_that_holds_no_block_says_so() -> None:
    with pytest.raises(InsufficientMemory, match="hold no block of 2097152") as refused:
        blocks(80 * GIB, kv_cache_memory_bytes=SLAB - 1)
    assert refused.value.param == "kv_cache_memory_bytes"


@pytest.mark.parametrize("left", [LATER, LATER // 2, -GIB])
def test_a_plan_that_does_not_fit_says_what_takes_how_much(left: int) -> None:
    with pytest.raises(InsufficientMemory) as refused:
        blocks(left)
    assert refused.value.param == "gpu_memory_utilization"
    for part in (
        "0.9",
        "16.00 GiB of weights",
        "3.00 GiB for the largest step",
        f"{LATER / GIB:.2f} GiB of them",
    ):
        assert part in str(refused.value)


def test_buckets_reach_every_step_and_no_further() -> None:
    assert Buckets.up_to(6, 1, 100).sizes == (1, 2, 4, 6)
    assert Buckets.up_to(256, 1, 8192).sizes == (
        (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    )
    assert Buckets.up_to(256, 9, 512).sizes[-5:] == (256, 320, 384, 448, 512)
    assert Buckets.up_to(40, 1, 8192, 32).sizes == (32, 64)
    some = Buckets.up_to(64, 1, 8192)
    assert [some.padded(rows) for rows in (1, 3, 33, 64, 65)] == [1, 4, 48, 64, None]
