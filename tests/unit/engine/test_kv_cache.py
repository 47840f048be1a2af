"""The pool in segments of several types: where each lies, and that what is not finite is found in any."""

from __future__ import annotations

import itertools

import pytest
import torch

from common.engine.devices.kv_cache import STORED_DTYPES, KVCache, blocks_for_memory
from common.engine.runner.soundness import finite_blocks
from common.errors import ConfigError, InsufficientMemory
from common.kv_layout import SCALED_DTYPES, KVLayout


def layout(dtype: str, block_size: int = 5, **fields: int) -> KVLayout:
    shape = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4} | fields
    return KVLayout.paged_attention(block_size=block_size, dtype=dtype, **shape)


LAYOUTS = {
    "bfloat16": layout("bfloat16"),
    "fp8": layout("float8_e4m3fn"),
    "e5m2": layout("float8_e5m2"),
    "fp8 with a draft in bfloat16": layout("float8_e4m3fn").with_draft(layout("bfloat16", num_layers=1)),
    "float32 with a draft in fp8": layout("float32").with_draft(layout("float8_e4m3fn", num_layers=1)),
}
every_layout = pytest.mark.parametrize("lies", LAYOUTS.values(), ids=LAYOUTS.keys())


def cache_of(lies: KVLayout, num_blocks: int = 4) -> KVCache:
    return KVCache(lies, num_blocks, torch.zeros(num_blocks, lies.slab_bytes, dtype=torch.uint8))


@every_layout
def test_each_segment_is_a_view_of_its_own_bytes_in_its_own_type(lies: KVLayout) -> None:
    cache = cache_of(lies)
    for segment in lies.segments:
        view = cache.view(segment.layer, segment.kind)
        assert view.dtype == STORED_DTYPES[segment.dtype]
        assert view.shape == (4, *segment.shape)
        assert cache.offset_bytes(segment.layer, segment.kind) == segment.offset
        view.view(torch.uint8)[2] = 7
        touched = torch.zeros_like(cache.slabs, dtype=torch.bool)
        touched[2, segment.offset : segment.offset + segment.num_bytes] = True
        assert torch.equal(cache.slabs == 7, touched)
        cache.slabs.zero_()


@every_layout
def test_keys_and_values_of_8_bits_have_scales_and_no_others(lies: KVLayout) -> None:
    cache = cache_of(lies)
    for segment in lies.segments:
        if segment.kind in ("k", "v"):
            scales = cache.scales(segment.layer, segment.kind)
            assert (scales is not None) == (segment.dtype in SCALED_DTYPES)
            if scales is not None:
                assert scales.shape == (4, *segment.shape[:2])
                assert scales.dtype == torch.bfloat16


@every_layout
def test_poison_is_in_every_element_of_the_blocks_named_and_nowhere_else(lies: KVLayout) -> None:
    cache = cache_of(lies)
    cache.poison([1, 3])
    for segment in lies.segments:
        is_nan = cache.view(segment.layer, segment.kind).float().isnan().flatten(1)
        assert is_nan.all(1).tolist() == is_nan.any(1).tolist() == [False, True, False, True]
    between = torch.ones(lies.slab_bytes, dtype=torch.bool)
    for segment in lies.segments:
        between[segment.offset : segment.offset + segment.num_bytes] = False
    assert not cache.slabs[:, between].any(), "what lies between segments stays zero"


@every_layout
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_whatever_is_not_finite_in_a_block_is_found_wherever_it_lies(lies: KVLayout, number: float) -> None:
    own = lies.without_draft.segments
    for segment, last in itertools.product(lies.segments, (False, True)):
        if segment.dtype == "float8_e4m3fn" and number == float("inf"):
            continue  # it has none
        cache = cache_of(lies)
        rows = cache.view(segment.layer, segment.kind)[2]
        rows.view(-1)[-1 if last else 0] = number
        blocks = torch.tensor([0, 1, 3, 2] * 5)  # more than are summed at once
        found = finite_blocks(blocks, cache.own_parts).tolist()
        assert found == [True, True, True, segment not in own] * 5
        assert finite_blocks(blocks, cache.parts).tolist() == [True, True, True, False] * 5


def test_a_block_is_copied_with_its_scales() -> None:
    lies = LAYOUTS["fp8 with a draft in bfloat16"]
    cache = cache_of(lies)
    cache.slabs[1] = torch.arange(lies.slab_bytes).to(torch.uint8)
    cache.copy_blocks([(1, 3)])
    assert torch.equal(cache.slabs[1], cache.slabs[3])


def test_memory_of_another_shape_is_refused() -> None:
    lies = LAYOUTS["fp8"]
    with pytest.raises(ConfigError, match="contiguous bytes"):
        KVCache(lies, 4, torch.zeros(4, lies.slab_bytes - 16, dtype=torch.uint8))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_8_bits_give_twice_the_blocks_of_bfloat16_less_the_scales(head_dim: int) -> None:
    wide, narrow = (
        layout(dtype, 16, num_layers=24, num_kv_heads=4, head_dim=head_dim)
        for dtype in ("bfloat16", "float8_e4m3fn")
    )
    assert narrow.slab_bytes == wide.slab_bytes // 2 * (head_dim + 2) // head_dim
    memory = 1 << 30
    before, after = (blocks_for_memory(lies, memory) for lies in (wide, narrow))
    assert after == pytest.approx(2 * before * head_dim / (head_dim + 2), abs=2)
    with pytest.raises(InsufficientMemory):
        blocks_for_memory(narrow, narrow.slab_bytes - 1)
