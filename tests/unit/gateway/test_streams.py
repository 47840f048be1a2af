"""Tokens are put in order by position: any order and any duplication gives the same result."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.wire.messages import TokenLogprobs, TokenRun
from gateway.streams import ChoiceStream

PROMPT = 7


def run(position: int, *ids: int, attempt: int = 1, finish: str = "") -> TokenRun:
    return TokenRun("r", attempt, 0, position, ids, (), finish)


def cut(ids: list[int], edges: list[int]) -> list[TokenRun]:
    """The ids as runs between `edges`, the last one with the end of the choice."""
    inner = sorted({edge for edge in edges if 0 < edge < len(ids)})
    bounds = [0, *inner, len(ids)]
    return [
        run(PROMPT + a, *ids[a:b], finish="stop" if b == len(ids) else "")
        for a, b in itertools.pairwise(bounds)
    ]


@given(st.data())
def test_any_order_and_duplication_gives_the_same_tokens(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=20))
    first = cut(ids, data.draw(st.lists(st.integers(0, 20))))
    again = cut(ids, data.draw(st.lists(st.integers(0, 20))))  # resent, cut differently
    runs = data.draw(st.permutations(first + data.draw(st.lists(st.sampled_from(again)))))
    stream = ChoiceStream(PROMPT, 20)
    seen: list[int] = []
    endings = []
    for one in runs:
        arrival = stream.accept(one)
        seen += [token.token_id for token in arrival.delivered]
        assert arrival.mismatched == 0
        assert stream.below == PROMPT + len(seen)
        endings += [arrival.finished] if arrival.finished else []
    assert seen == ids == list(stream.token_ids)
    assert endings == ["stop"]
    assert stream.finished == "stop"


@given(st.data())
def test_a_retry_goes_on_where_delivery_stopped(data: st.DataObject) -> None:
    """Runs of a dead attempt mixed with those of the new one: each position once, in order."""
    ids = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=20))
    old = cut(ids, data.draw(st.lists(st.integers(0, 20))))
    stream = ChoiceStream(PROMPT, 20)
    seen: list[int] = []
    for one in data.draw(st.lists(st.sampled_from(old[:-1]), unique=True)) if len(old) > 1 else []:
        seen += [token.token_id for token in stream.accept(one).delivered]
    stream.begin(2)
    border = stream.below - PROMPT
    new = [
        run(PROMPT + i, ids[i], attempt=2, finish="stop" if i == len(ids) - 1 else "")
        for i in range(border, len(ids))
    ]
    for one in data.draw(st.permutations(old + new)):
        arrival = stream.accept(one)
        assert arrival.mismatched == 0
        assert not (one.attempt == 1 and arrival.delivered)
        seen += [token.token_id for token in arrival.delivered]
    assert seen == ids
    assert stream.finished == "stop"


@given(st.data())
def test_drafts_count_once_with_the_tokens_that_are_delivered_whatever_is_resent_or_retried(
    data: st.DataObject,
) -> None:
    ids = list(range(data.draw(st.integers(2, 20))))

    def drafted(runs: list[TokenRun], attempt: int) -> list[TokenRun]:
        made = []
        for one in runs:
            accepted = data.draw(st.sampled_from([max(0, len(one.token_ids) - 1), 0]))
            room = PROMPT + 29 - one.position
            in_all = data.draw(st.integers(accepted, min(accepted + 4, room)))
            made.append(dataclasses.replace(one, attempt=attempt, drafted=in_all, accepted=accepted))
        return made

    old = drafted(cut(ids, data.draw(st.lists(st.integers(0, 20)))), 1)
    stream = ChoiceStream(PROMPT, 30)
    sent = data.draw(st.lists(st.sampled_from(old), max_size=12))
    tokens = [token for one in sent for token in stream.accept(one).delivered]
    expected = [one for one in old if one.end <= stream.below]
    if stream.finished is None:
        stream.begin(2)
        border = stream.below - PROMPT
        new = [
            dataclasses.replace(one, position=one.position + border)
            for one in drafted(cut(ids[border:], data.draw(st.lists(st.integers(0, 20)))), 2)
        ]
        for one in data.draw(st.permutations([*new, *new, *old])):
            tokens += stream.accept(one).delivered
        expected += new
    assert [token.token_id for token in tokens] == ids
    assert sum(token.accepted for token in tokens) == sum(one.accepted for one in expected)
    assert sum(token.rejected for token in tokens) == sum(one.drafted - one.accepted for one in expected)


def test_the_first_token_may_be_the_last_and_may_come_last() -> None:
    only = ChoiceStream(PROMPT, 1)
    assert only.accept(run(PROMPT, 3, finish="length")).finished == "length"

    late = ChoiceStream(PROMPT, 3)
    assert late.accept(run(PROMPT + 1, 4, 5, finish="length")).delivered == ()
    assert late.below == PROMPT
    arrival = late.accept(run(PROMPT, 3))
    assert [token.token_id for token in arrival.delivered] == [3, 4, 5]
    assert arrival.finished == "length"


def test_an_end_without_tokens_ends_the_choice() -> None:
    stream = ChoiceStream(PROMPT, 3)
    stream.accept(run(PROMPT, 3))
    assert stream.accept(run(PROMPT + 1, finish="stop")).finished == "stop"


def test_a_position_with_another_token_is_counted_and_the_first_stays() -> None:
    stream = ChoiceStream(PROMPT, 3)
    stream.accept(run(PROMPT, 3, 4))
    arrival = stream.accept(run(PROMPT, 3, 9))
    assert (arrival.duplicates, arrival.mismatched) == (2, 1)
    assert stream.token_ids == (3, 4)


def test_an_old_attempt_is_compared_never_delivered() -> None:
    stream = ChoiceStream(PROMPT, 5)
    stream.accept(run(PROMPT, 3))
    stream.begin(2)
    arrival = stream.accept(run(PROMPT, 3, 4, attempt=1))
    assert arrival.delivered == ()
    assert arrival.mismatched == 0
    assert stream.accept(run(PROMPT, 8, attempt=1)).mismatched == 1
    old = run(PROMPT, 3, 4, attempt=1)
    assert stream.acknowledged(old) == PROMPT + 2, "so that its sender forgets it"
    assert stream.acknowledged(run(PROMPT + 1, 4, attempt=2)) == PROMPT + 1


def test_what_waited_in_an_old_attempt_is_forgotten() -> None:
    stream = ChoiceStream(PROMPT, 5)
    stream.accept(run(PROMPT + 1, 9))
    stream.accept(run(PROMPT + 3, finish="stop"))
    stream.begin(2)
    arrival = stream.accept(run(PROMPT, 3, 4, 5, 6, attempt=2, finish="stop"))
    assert [token.token_id for token in arrival.delivered] == [3, 4, 5, 6]
    assert (arrival.mismatched, arrival.finished) == (0, "stop")


def test_an_end_before_what_was_delivered_is_an_error_of_the_node() -> None:
    stream = ChoiceStream(PROMPT, 5)
    stream.accept(run(PROMPT, 3, 4))
    assert stream.accept(run(PROMPT, 3, finish="stop")).mismatched == 1
    assert stream.finished is None


def test_logprobs_stay_with_their_token() -> None:
    stream = ChoiceStream(PROMPT, 5)
    first, second = (TokenLogprobs(value, 1, (), ()) for value in (-0.5, -1.5))
    stream.accept(TokenRun("r", 1, 0, PROMPT + 1, (4,), (second,), ""))
    arrival = stream.accept(TokenRun("r", 1, 0, PROMPT, (3,), (first,), ""))
    assert [token.logprobs for token in arrival.delivered] == [first, second]


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (run(PROMPT - 1, 3), "position"),
        (run(PROMPT, 1, 2, 3, 4), "position"),
        (run(PROMPT, 1, attempt=2), "attempt"),
        (run(PROMPT, 1, finish="error"), "finish_reason"),
        (TokenRun("r", 1, 0, PROMPT, (3, 4), (TokenLogprobs(0.0, 1, (), ()),), ""), "logprobs"),
        (TokenRun("r", 1, 0, PROMPT, (3,), (), "", drafted=-1), "drafted"),
        (TokenRun("r", 1, 0, PROMPT, (3,), (), "", drafted=3), "drafted"),
        (TokenRun("r", 1, 0, PROMPT, (3,), (), "", drafted=2, accepted=-1), "drafted"),
        (TokenRun("r", 1, 0, PROMPT, (3,), (), "", drafted=2, accepted=2), "drafted"),
        (TokenRun("r", 1, 0, PROMPT, (3, 4), (), "", drafted=1, accepted=2), "drafted"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_changes_nothing(bad: TokenRun, param: str) -> None:
    stream = ChoiceStream(PROMPT, 3)
    with pytest.raises(ProtocolError) as caught:
        stream.accept(bad)
    assert caught.value.param == param
    assert stream.below == PROMPT
    assert stream.finished is None
