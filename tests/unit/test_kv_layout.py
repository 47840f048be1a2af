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
from common.kv_layout import HASHED_AT_ONCE, Fingerprint, HashChain, KVLayout, Mismatch, Segment, root_hash
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
    assert differs.field in ("layout", "num_layers", "dtype", "num_kv_heads", "head_range", "head_dim")


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
