"""N-gram lookup against the scan that it replaces."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from common.engine.core.sequence import Sequence
from common.engine.speculation import ngram
from common.engine.speculation.ngram import NGramSource
from common.engine.speculation.ngram_index import SIZES, NGramIndex, tags
from common.sampling import SamplingParams


def a_sequence(
    tokens: list[int],
    prompt_len: int | None = None,
    prediction: list[int] = [],  # noqa: B006
    *,
    name: int = 1,
    request: str = "r",
) -> Sequence:
    length = len(tokens) if prompt_len is None else prompt_len
    return Sequence(name, request, name, length, list(tokens), SamplingParams(), prediction=list(prediction))


def scan(text: list[int], tail: list[int]) -> int | None:
    """Where the last occurrence of the longest n-gram ends, by looking at all of them."""
    for size in reversed(SIZES):
        if size <= len(tail):
            for end in range(len(text), size - 1, -1):
                if text[end - size : end] == tail[-size:]:
                    return end
    return None


def indexed(source: NGramSource, sequence: Sequence) -> NGramSource:
    """A long text takes several steps."""
    for _ in range(len(sequence.token_ids) // ngram.AT_LEAST + 1):
        source.draft(sequence, 1)
    return source


@pytest.mark.parametrize("alphabet", [2, 5, 50])
def test_it_finds_what_a_scan_finds_however_the_text_came(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(60):
        text = [generator.randrange(alphabet) for _ in range(generator.randrange(2, 200))]
        end = generator.randrange(1, len(text))
        sequence, source = a_sequence(text[:end]), NGramSource()
        while end < len(text):
            at = scan(text[: end - 1], text[:end])
            assert source.draft(sequence, 1) == ([] if at is None else [text[at]])
            end += generator.choice([1, 1, 2, 7, 40])
            sequence.token_ids = text[:end]


def test_a_long_prompt_is_indexed_in_pieces_that_join() -> None:
    generator = random.Random(3)
    text = [generator.randrange(6) for _ in range(1000)]
    pieces, whole = NGramIndex(), NGramIndex()
    for end in (*range(7, 200, 7), *range(200, 1000, 100), 1000):
        pieces.add(text, end, expected=1000)
    whole.add(text, 1000)
    for end in range(1, 1001):
        for size, tag in zip(SIZES, tags(text, end), strict=False):
            last = pieces.find(tag)
            assert last == whole.find(tag) >= end
            assert text[last - size : last] == text[end - size : end]


def test_n_grams_that_fall_on_each_others_places_are_all_kept() -> None:
    index, generator = NGramIndex(), random.Random(4)
    text = [generator.randrange(2**17) for _ in range(20_000)]
    index.add(text, len(text))
    assert 1 < index.num_bytes / (8 * len(SIZES) * len(text)) < 1.6
    missing = sum(index.find(tag) != end for end in range(16, len(text)) for tag in tags(text, end))
    assert missing <= 3, "but for those with the same tag"


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
    sequences = [a_sequence([1, 2, 1, 2, 1] * 99, prediction=[1, 2, 3] * 99, name=name) for name in range(3)]
    for sequence in sequences:
        indexed(source, sequence)
    assert source.num_bytes > 0
    for sequence in sequences:
        source.ended(sequence)
        source.ended(sequence)
    assert not source._texts
    assert not source._shared
    assert source.num_bytes == 0


def test_choices_of_one_prompt_share_its_index_and_not_their_replies() -> None:
    generator = random.Random(5)
    prompt = [generator.randrange(32_000) for _ in range(4_000)]
    source = NGramSource()
    one = indexed(source, a_sequence(prompt)).num_bytes
    others = [a_sequence([*prompt, 7, 8, 9, name, 7, 8], len(prompt), name=name) for name in range(2, 17)]
    for sequence in others:
        assert source.draft(sequence, 2) == [9, sequence.sequence_id]
    assert source.num_bytes < 1.1 * one


def test_an_index_takes_a_few_bytes_a_token() -> None:
    generator = random.Random(6)
    prompt = [generator.randrange(32_000) for _ in range(30_000)]
    tracemalloc.start()
    source = indexed(NGramSource(), a_sequence(prompt))
    held = tracemalloc.get_traced_memory()[0]
    del source
    held -= tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 64 * len(prompt)


def test_all_indexes_together_are_bounded_and_those_used_longest_ago_make_way() -> None:
    generator = random.Random(7)
    sequences = [
        a_sequence([generator.randrange(32_000) for _ in range(2_000)], name=name, request=str(name))
        for name in range(20)
    ]
    bound = NGramSource(500_000)
    for sequence in sequences:  # one after the other
        sequence.token_ids[-2:] = sequence.token_ids[:2]
        assert indexed(bound, sequence).draft(sequence, 1) == [sequence.token_ids[2]]
    assert bound.num_bytes < 700_000
    assert len(bound._texts) < 8

    full = NGramSource(500_000)
    for _ in range(100):  # all at once: what is in use stays, and what came too late goes without
        found = [full.draft(sequence, 1) for sequence in sequences]
    assert full.num_bytes < 700_000
    assert 3 < sum(map(bool, found)) < 10
    before = [index.indexed for index in (text.shared.prompt for text in full._texts.values())]
    for sequence in sequences:
        full.draft(sequence, 1)
    assert before == [index.indexed for index in (text.shared.prompt for text in full._texts.values())]


def test_long_prompts_that_come_together_share_what_is_indexed_before_a_step() -> None:
    """The event loop waits meanwhile."""
    source = NGramSource()
    sequences = [a_sequence(list(range(30_000)), name=name, request=str(name)) for name in range(16)]

    def step() -> int:
        for sequence in sequences:
            source.draft(sequence, 8)
        return sum(shared.prompt.indexed for shared in source._shared.values())

    before = step()
    assert 0 < step() - before <= ngram.AT_ONCE
