"""Layouts and fingerprints: what two nodes must have in common, and what is named where it differs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import kv_layout
from common.kv_layout import (
    ALIGNMENT,
    DTYPE_BYTES,
    HASHED_AT_ONCE,
    Fingerprint,
    HashChain,
    KVLayout,
    Mismatch,
    Segment,
    root_hash,
)
from tests.support.hashes import chain_hashes

LAYOUT = KVLayout.paged_attention(num_layers=24, num_kv_heads=4, head_dim=64, block_size=16, dtype="bfloat16")


def layout(**fields: Any) -> KVLayout:
    same: dict[str, Any] = {
        "num_layers": 24,
        "num_kv_heads": 4,
        "head_dim": 64,
        "block_size": 16,
        "dtype": "bfloat16",
    }
    return KVLayout.paged_attention(**(same | fields))


def changed(change: Callable[[Segment], Segment]) -> KVLayout:
    return KVLayout(16, tuple(map(change, LAYOUT.segments)))


def fingerprint(lies: KVLayout = LAYOUT, **fields: Any) -> Fingerprint:
    same = Fingerprint("model", "revision", lies.describe(), "numerics", lies.block_size)
    return dataclasses.replace(same, **fields)


def test_a_layout_of_equal_layers_is_described_in_one_line() -> None:
    assert LAYOUT.describe() == ("layers 0-24: k bfloat16 heads 0-4 of 64, v bfloat16 heads 0-4 of 64")


def test_layers_that_differ_are_described_in_groups() -> None:
    def latent(segment: Segment) -> Segment:
        if segment.layer not in (3, 4):
            return segment
        return dataclasses.replace(segment, kind="latent", shape=(16, 1, 576), head_end=1)

    assert changed(latent).describe() == (
        "layers 0-3: k bfloat16 heads 0-4 of 64, v bfloat16 heads 0-4 of 64; "
        "layers 3-5: latent bfloat16 heads 0-1 of 576, latent bfloat16 heads 0-1 of 576; "
        "layers 5-24: k bfloat16 heads 0-4 of 64, v bfloat16 heads 0-4 of 64"
    )


SMALL = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32}


def test_a_draft_models_segments_lie_behind_and_no_digest_covers_them() -> None:
    draft = layout(**SMALL)
    both = LAYOUT.with_draft(draft)
    assert both.slab_bytes == LAYOUT.slab_bytes + draft.slab_bytes
    assert both.segments[: len(LAYOUT.segments)] == LAYOUT.segments
    assert [segment.layer for segment in both.segments[-4:]] == [24, 24, 25, 25]
    assert both.describe() == LAYOUT.describe()
    assert both.describe_draft() == "layers 24-26: k bfloat16 heads 0-2 of 32, v bfloat16 heads 0-2 of 32"
    assert both.without_draft == LAYOUT.without_draft == LAYOUT
    tail = both.ranges(3)
    assert tail[: len(LAYOUT.segments)] == LAYOUT.ranges(3), "at the same places with any draft model"
    assert len(tail) == len(both.segments), "they travel all the same"
    assert sum(length for _, length in tail) * 16 == both.slab_bytes * 3
    assert both.with_block_size(48) == layout(block_size=48).with_draft(layout(block_size=48, **SMALL))


FP8 = layout(dtype="float8_e4m3fn")


def test_scales_are_segments_behind_all_keys_and_values() -> None:
    assert FP8.describe() == (
        "layers 0-24: k float8_e4m3fn heads 0-4 of 64, v float8_e4m3fn heads 0-4 of 64; "
        "layers 0-24: k_scale bfloat16 heads 0-4, v_scale bfloat16 heads 0-4"
    )
    assert FP8.num_layers == 24
    assert {s.shape for s in FP8.segments if s.kind.endswith("_scale")} == {(16, 4)}
    offsets = [s.offset for s in FP8.segments if s.kind in ("k", "v")]
    assert offsets == list(range(0, 48 * 16 * 4 * 64, 16 * 4 * 64)), "at equal distances, as of any type"


dtypes = st.sampled_from(sorted(DTYPE_BYTES))
layouts = st.builds(
    KVLayout.paged_attention,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    block_size=st.integers(1, 33),
    dtype=dtypes,
)


@st.composite
def with_drafts(draw: st.DrawFn) -> KVLayout:
    lies = draw(layouts)
    draft = draw(st.none() | layouts)
    return lies if draft is None else lies.with_draft(draft.with_block_size(lies.block_size))


@given(lies=with_drafts())
def test_segments_are_aligned_apart_and_inside_the_slab(lies: KVLayout) -> None:
    assert lies.slab_bytes % ALIGNMENT == 0
    end = 0
    for segment in lies.segments:
        assert segment.offset % ALIGNMENT == 0
        assert 0 <= segment.offset - end < ALIGNMENT
        end = segment.offset + segment.num_bytes
    assert 0 <= lies.slab_bytes - end < ALIGNMENT
    own = lies.without_draft
    assert own.segments == lies.segments[: len(own.segments)]
    assert own.slab_bytes <= lies.slab_bytes


@given(lies=with_drafts(), data=st.data())
def test_a_tail_has_the_first_positions_of_every_segment_scales_included(
    lies: KVLayout, data: st.DataObject
) -> None:
    assert lies.ranges() == [(0, lies.slab_bytes)]
    if lies.block_size == 1:
        return
    fill = data.draw(st.integers(1, lies.block_size - 1))
    for (offset, length), segment in zip(lies.ranges(fill), lies.segments, strict=True):
        assert offset == segment.offset
        assert length * lies.block_size == segment.num_bytes * fill


@given(lies=with_drafts(), block_size=st.integers(1, 70))
def test_there_and_back_to_another_block_size_is_the_same_layout(lies: KVLayout, block_size: int) -> None:
    other = lies.with_block_size(block_size)
    assert other.describe() == lies.describe()
    assert other.describe_draft() == lies.describe_draft()
    assert other.without_draft == lies.without_draft.with_block_size(block_size)
    assert other.with_block_size(lies.block_size) == lies


def scales(change: Callable[[Segment], Segment]) -> KVLayout:
    return KVLayout(16, tuple(change(s) if s.kind == "k_scale" else s for s in FP8.segments))


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (LAYOUT, ("dtype", "float8_e4m3fn", "bfloat16")),
        (layout(dtype="float8_e5m2"), ("dtype", "float8_e4m3fn", "float8_e5m2")),
        (layout(dtype="float8_e4m3fn", num_layers=32), ("num_layers", "24", "32")),
        (scales(lambda s: dataclasses.replace(s, dtype="float32")), ("k_scale dtype", "bfloat16", "float32")),
        (scales(lambda s: dataclasses.replace(s, shape=(16, 4, 2))), ("k_scale head_dim", "none", "2")),
        (scales(lambda s: dataclasses.replace(s, head_end=1)), ("k_scale num_kv_heads", "4", "1")),
        (
            scales(lambda s: dataclasses.replace(s, head_start=4, head_end=8)),
            ("k_scale head_range", "0-4", "4-8"),
        ),
        (KVLayout(16, FP8.segments[:48]), ("layout", FP8.describe(), FP8.describe().partition(";")[0])),
    ],
)
def test_a_peer_that_keeps_kv_otherwise_is_told_what_differs(
    other: KVLayout, differs: tuple[str, str, str]
) -> None:
    mine, yours = fingerprint(FP8), fingerprint(other)
    assert mine.mismatch(yours) == Mismatch(*differs)
    assert yours.mismatch(mine) == Mismatch(differs[0], differs[2], differs[1])
    assert mine.digest() != yours.digest(), "nor does either find the other's blocks"


def test_nodes_with_different_draft_models_use_each_others_kv_under_the_same_hashes() -> None:
    one, other = fingerprint(draft="small@1"), fingerprint()
    assert one.mismatch(other) is None
    assert one.digest() == other.digest()


def test_a_layout_in_another_block_size_is_the_one_that_was_made_in_it() -> None:
    other = layout(block_size=48)
    assert LAYOUT.with_block_size(48) == other
    assert other.describe() == LAYOUT.describe()
    assert other.bytes_per_token == LAYOUT.bytes_per_token


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (fingerprint(model="m2"), ("model", "model", "m2")),
        (fingerprint(revision="r2"), ("revision", "revision", "r2")),
        (fingerprint(numerics="n2"), ("numerics", "numerics", "n2")),
        (fingerprint(adapter="a2"), ("adapter", "", "a2")),
        (fingerprint(layout(dtype="float32")), ("dtype", "bfloat16", "float32")),
        (fingerprint(layout(num_layers=32)), ("num_layers", "24", "32")),
        (fingerprint(layout(num_kv_heads=8)), ("num_kv_heads", "4", "8")),
        (fingerprint(layout(head_dim=128)), ("head_dim", "64", "128")),
        (
            fingerprint(changed(lambda s: dataclasses.replace(s, head_start=4, head_end=8))),
            ("head_range", "0-4", "4-8"),
        ),
        (
            fingerprint(changed(lambda s: dataclasses.replace(s, dtype="float16")), revision="r2"),
            ("revision", "revision", "r2"),
        ),
    ],
)
def test_the_field_that_differs_is_named_with_both_values(
    other: Fingerprint, differs: tuple[str, str, str]
) -> None:
    mine = fingerprint()
    assert mine.mismatch(other) == Mismatch(*differs)
    assert other.mismatch(mine) == Mismatch(differs[0], differs[2], differs[1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5f0c" * 8,
        "layers 0-24: ",
        "layers 0-24: k",
        "layers 1-24: k bfloat16 heads 0-4 of 64",
        "layers 0-24: v bfloat16 heads 0-4 of 64, k bfloat16 heads 0-4 of 64",
        "layers 0-24: k bfloat16 heads 0-4 of 64",
        LAYOUT.describe() + "; layers 24-25: k",
        "layers 0-" + "9" * 5000 + ": k bfloat16 heads 0-4 of 64",
    ],
)
def test_a_layout_whose_difference_has_no_name_differs_as_a_whole(text: str) -> None:
    """Of another version, of other kinds, or nonsense: said as it is, never an exception."""
    mine, other = fingerprint(), fingerprint(layout=text)
    assert mine.mismatch(other) == Mismatch("layout", LAYOUT.describe(), text)


@given(
    text=st.text()
    | st.from_regex(r"layers \d{1,9}-\d{1,9}: ([kv] \w+ heads \d{1,9}-\d{1,9} of [\dx]+(, )?)*")
)
@settings(max_examples=300, deadline=None)
def test_whatever_a_peer_says_of_its_layout_has_a_field_that_differs(text: str) -> None:
    differs = fingerprint().mismatch(fingerprint(layout=text))
    assert differs is not None
    assert differs.mine != differs.yours
    field = differs.field.rpartition(" ")[2]
    assert field in ("layout", "num_layers", "dtype", "num_kv_heads", "head_range", "head_dim")


def test_the_block_size_is_everybodys_own_choice_and_part_of_every_hash() -> None:
    mine, other = fingerprint(), fingerprint(layout(block_size=32))
    assert mine.mismatch(other) is None
    assert mine.digest() != other.digest()


@given(
    length=st.integers(0, 70),
    size=st.integers(1, 9),
    border=st.integers(0, 70),
    pieces=st.lists(st.integers(0, 40), max_size=8),
)
def test_hashes_do_not_depend_on_the_pieces_in_which_they_are_computed(
    length: int, size: int, border: int, pieces: list[int]
) -> None:
    tokens, root = tuple(range(length)), root_hash(fingerprint())
    chain = HashChain(root, tokens, size, border)
    for piece in pieces:
        chain.advance(piece)
    while not chain.advance():
        pass
    assert chain.hashes == chain_hashes(root, tokens, size, border)
    assert len(chain.hashes) == length // size


@pytest.mark.parametrize("size", [1, 16, 256, 10_000])
async def test_an_event_loop_goes_on_between_two_pieces_of_a_long_chain(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    hashed, original = [0], kv_layout.block_hash

    def block_hash(parent: bytes, token_ids: Sequence[int], num_prompt: int) -> bytes:
        hashed[-1] += len(token_ids)
        return original(parent, token_ids, num_prompt)

    async def watch() -> None:
        while True:
            hashed.append(0)
            await asyncio.sleep(0)

    monkeypatch.setattr(kv_layout, "block_hash", block_hash)
    watching = asyncio.create_task(watch())
    tokens = range(10 * HASHED_AT_ONCE)
    await HashChain(root_hash(fingerprint()), tokens, size, len(tokens)).finish()
    watching.cancel()
    assert sum(hashed) == len(tokens) // size * size
    assert max(hashed) <= max(HASHED_AT_ONCE, size)
