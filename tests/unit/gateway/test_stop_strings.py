"""Stop strings: the same cut wherever the stream was cut, holding back no more than needed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopStrings

SMALL = st.text(alphabet="ab\n", max_size=30)


def first_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop that is complete first, the longest of those; text before it."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=SMALL,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30)),
)
def test_the_cut_does_not_depend_on_how_the_text_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopStrings(stops)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    seen = ""
    for start, end in itertools.pairwise(edges):
        seen += matcher.push(text[start:end])
        if matcher.stopped is None:
            held = text[:end].removeprefix(seen)
            longest = max(
                (k for stop in stops for k in range(len(stop)) if text[:end].endswith(stop[:k])), default=0
            )
            assert len(held) == longest, "holds back exactly what could begin a stop string"
    seen += matcher.finish()
    assert (seen, matcher.stopped) == first_cut(text, stops)


def test_nothing_is_held_without_stop_strings() -> None:
    assert StopStrings([]).push("any\n") == "any\n"


def test_text_after_the_stop_is_dropped() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.push(piece) for piece in ("a E", "ND b", "c")] == ["a ", "", ""]
    assert matcher.finish() == ""


@pytest.mark.parametrize("stop", ["aab", "abab", "\n\n"])
def test_overlapping_beginnings(stop: str) -> None:
    text = "a" + stop[:-1] + stop
    matcher = StopStrings([stop])
    assert "".join(map(matcher.push, text)) + matcher.finish() == text[: text.index(stop)]
