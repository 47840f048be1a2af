"""N-gram lookup against the scan that it replaces."""

from __future__ import annotations

import random

import pytest

from common.engine.core.sequence import Sequence
from common.engine.speculation import ngram
from common.engine.speculation.ngram import SIZES, NGramIndex, NGramSource
from common.sampling import SamplingParams


def a_sequence(tokens: list[int], prompt_len: int | None = None, prediction: list[int] = []) -> Sequence:  # noqa: B006
    length = len(tokens) if prompt_len is None else prompt_len
    return Sequence(1, "r", 0, length, list(tokens), SamplingParams(), prediction=list(prediction))


def scan(text: list[int], tail: list[int]) -> int | None:
    """Where the last occurrence of the longest n-gram ends, by looking at all of them."""
    for size in SIZES:
        if size <= len(tail):
            for end in range(len(text), size - 1, -1):
                if text[end - size : end] == tail[-size:]:
                    return end
    return None


@pytest.mark.parametrize("alphabet", [2, 5, 50])
def test_it_finds_what_a_scan_finds_however_the_text_came(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(60):
        text = [generator.randrange(alphabet) for _ in range(generator.randrange(2, 120))]
        index, end = NGramIndex(), 0
        while end < len(text) - 1:
            end = min(len(text) - 1, end + generator.choice([1, 1, 2, 7, 40]))
            index.add(text, end)
            assert index.follow(text, text[: end + 1]) == scan(text[:end], text[: end + 1])


def test_a_long_prompt_is_indexed_in_pieces_that_join() -> None:
    text = [random.Random(3).randrange(6) for _ in range(100)]
    pieces, whole = NGramIndex(), NGramIndex()
    for _ in range(100 // 7 + 1):
        pieces.add(text, 99, 7)
    whole.add(text, 99)
    assert pieces.follow(text, text) == whole.follow(text, text) == scan(text[:99], text)


def test_the_longest_match_goes_first_and_among_equals_the_last() -> None:
    text = [1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 9, 1, 2, 3, 4]
    assert NGramSource().draft(a_sequence(text), 2) == [50, 9], "four tokens match there, two elsewhere"
    text = [3, 4, 50, 9, 3, 4, 60, 9, 9, 8, 3, 4]
    assert NGramSource().draft(a_sequence(text), 1) == [60]


def test_what_repeats_goes_on_repeating() -> None:
    assert NGramSource().draft(a_sequence([7, 1, 2, 3, 1, 2, 3, 1, 2, 3]), 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NGramSource().draft(a_sequence([7, 5, 5, 5, 5]), 4) == [5, 5, 5, 5]


def test_nothing_is_drafted_where_nothing_was_said_before() -> None:
    assert NGramSource().draft(a_sequence(list(range(40))), 8) == []
    assert NGramSource().draft(a_sequence([1]), 8) == []


def test_what_the_client_predicts_goes_before_what_was_said() -> None:
    prediction = [10, 11, 12, 13, 14, 15]
    prompt = [10, 11, 99, 98, 97]
    source = NGramSource()
    sequence = a_sequence(prompt, prediction=prediction)
    sequence.token_ids += [10]
    assert source.draft(sequence, 3) == [11, 12, 13], "decoding begins after the first token"
    sequence.token_ids += [11]
    assert source.draft(sequence, 3) == [12, 13, 14]
    sequence.token_ids += [77]
    assert source.draft(sequence, 3) == [], "it went another way"
    sequence.token_ids += [13, 14]
    assert source.draft(sequence, 3) == [15], "and is back"


def test_a_prediction_that_begins_otherwise_says_nothing_of_the_second_token() -> None:
    source = NGramSource()
    assert source.draft(a_sequence([1, 2, 3, 40], prompt_len=3, prediction=[41, 40, 42, 43]), 3) == []
    assert source.draft(a_sequence([1, 2, 3, 40], prompt_len=3, prediction=[40]), 3) == []


def test_nothing_is_kept_of_a_sequence_that_has_ended() -> None:
    source = NGramSource()
    sequence = a_sequence([1, 2, 1, 2, 1], prediction=[1, 2, 3])
    source.draft(sequence, 3)
    source.ended(sequence)
    assert not source._texts
    assert not source._predictions


def test_long_prompts_that_come_together_share_what_is_indexed_before_a_step() -> None:
    """The event loop waits meanwhile."""
    source = NGramSource()
    sequences = [a_sequence(list(range(30_000))) for _ in range(16)]
    for name, sequence in enumerate(sequences):
        sequence.sequence_id = name
        source.draft(sequence, 8)
    before = [index._indexed for index in source._texts.values()]
    for sequence in sequences:
        source.draft(sequence, 8)
    after = [index._indexed for index in source._texts.values()]
    assert 0 < sum(after) - sum(before) <= ngram.AT_ONCE
