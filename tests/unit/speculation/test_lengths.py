"""How many tokens are drafted: as many as pay, by what steps cost and how often drafts are right."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from common.engine.speculation.lengths import (
    REHEARSED,
    Acceptance,
    RoundCosts,
    StepCosts,
    choose_lengths,
    gain,
)

MOST = 8
Cost = Callable[[int], float]


def tiled(rows: int) -> float:
    """A device that computes sixteen rows at the price of one, as ours does."""
    return 20.0 * -(-rows // 16)


def linear(rows: int) -> float:
    """One that is busy with a single row."""
    return 20.0 * rows


def flat(rows: int) -> float:
    return 20.0


def run(
    cost: Cost, sequences: int, rate: float, *, steps: int = 600, prior: float = 0.5, noise: float = 0.1
) -> tuple[float, list[int]]:
    """Tokens per unit of time over the second half, against one by one; and the rows of each step."""
    random_ = random.Random(1)
    costs, acceptance = StepCosts(), [Acceptance() for _ in range(sequences)]
    tokens = seconds = 0.0
    rows_of: list[int] = []
    for step in range(steps):
        rates = [each.rate(prior) for each in acceptance]
        lengths = choose_lengths(costs, rates, [MOST] * sequences, 0)
        rows = sequences + sum(lengths)
        took = cost(rows) * random_.uniform(1 - noise, 1 + noise)
        costs.took(rows, took)
        rows_of.append(rows)
        got = sequences
        for each, length in zip(acceptance, lengths, strict=True):
            accepted = 0
            while accepted < length and random_.random() < rate:
                accepted += 1
            each.observe(length, accepted)
            got += accepted
        if step >= steps // 2:
            tokens, seconds = tokens + got, seconds + took
    return tokens / seconds / (sequences / cost(sequences)), rows_of


def best(cost: Cost, sequences: int, rate: float) -> float:
    """The same with everything known, all drafts of one length."""

    def gain(length: int) -> float:
        tokens = sum(rate**place for place in range(length + 1))
        return tokens * cost(sequences) / cost(sequences * (1 + length))

    return max(gain(length) for length in range(MOST + 1))


@pytest.mark.parametrize("cost", [tiled, linear, flat])
@pytest.mark.parametrize("sequences", [1, 3, 16, 64])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_nobody_gets_slower_and_most_of_what_can_be_gained_is(
    cost: Cost, sequences: int, rate: float
) -> None:
    gained, _ = run(cost, sequences, rate)
    assert gained > 0.97
    assert gained > 0.85 * best(cost, sequences, rate)


def test_where_nothing_can_be_gained_hardly_anything_is_drafted() -> None:
    _, rows = run(linear, 4, 0.9)
    assert np.mean(rows[300:]) < 4.2


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.took(1, 20.0)
    costs.took(8, 400.0)  # somebody else had the machine
    assert choose_lengths(costs, [0.9], [7], 0)[0] < 7
    for _ in range(20_000):
        (length,) = choose_lengths(costs, [0.9], [7], 0)
        costs.took(1 + length, 20.0)
    assert choose_lengths(costs, [0.9], [7], 0) == [7]


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 1e-300])
@pytest.mark.parametrize("rows", [0, 1, 8, 24])
@pytest.mark.parametrize("before", [0, 50])
def test_a_step_that_took_what_cannot_be_does_not_turn_drafts_off(
    seconds: float, rows: int, before: int
) -> None:
    """A process that was stopped, or a clock or a runner that is wrong, once."""

    def steps(costs: StepCosts, count: int) -> list[int]:
        lengths = []
        for _ in range(count):
            (length,) = choose_lengths(costs, [0.9], [7], 0)
            costs.took(1 + length, 20.0)
            lengths.append(length)
        return lengths

    costs = StepCosts()
    steps(costs, before)
    costs.took(rows, seconds)
    assert np.mean(steps(costs, 30)[10:]) > 4


def test_a_machine_that_becomes_a_hundred_times_slower_is_believed_after_a_few_steps() -> None:
    costs = StepCosts()
    for level in (1.0, 100.0, 1.0):
        for _ in range(50):
            costs.took(1, 20.0 * level)
            costs.took(8, 60.0 * level)
        one, eight = costs.of(np.array([1, 8]))
        assert 2.8 < eight / one < 3.2


def test_longer_contexts_make_all_sizes_dearer_alike() -> None:
    """The larger ones are not avoided because they were seen last when everything cost more."""
    costs = StepCosts()
    for step in range(400):
        level = 1 + step / 100
        costs.took(1, 20.0 * level)
        costs.took(8, 22.0 * level)
    one, eight = costs.of(np.array([1, 8]))
    assert 1.0 <= eight / one < 1.3


def test_rows_go_to_those_who_make_the_most_of_them() -> None:
    costs = StepCosts()
    for _ in range(10):
        costs.took(3, 20.0)
        costs.took(8, 20.0)
        costs.took(12, 90.0)
        costs.took(16, 90.0)
    sure, unsure, none = choose_lengths(costs, [0.95, 0.2, 0.9], [8, 8, 0], 0)
    assert none == 0
    assert sure + unsure <= 5
    assert sure >= 4


def test_what_is_wrong_all_the_time_is_tried_less_and_less_but_not_never() -> None:
    _, rows = run(lambda rows: 20.0 + 5.0 * rows, 1, 0.0, steps=2000)
    assert 0 < sum(count > 1 for count in rows[1000:]) < 100


def test_what_was_seen_of_small_steps_is_held_against_large_ones_that_were_never_computed() -> None:
    costs = StepCosts()
    for rows in REHEARSED:
        costs.took(rows, tiled(rows))
    assert 0.5 < float(costs.of(np.array([192]))[0]) / (tiled(192) / tiled(1)) <= 1.0
    assert sum(choose_lengths(costs, [0.6] * 16, [8] * 16, 0)) <= 16


@pytest.mark.parametrize("round_cost", [0.0, 0.05, 0.3, 2.0])
def test_rounds_of_a_draft_model_count(round_cost: float) -> None:
    """With a lone sequence on a device to which rows are free, the best length is known."""
    costs = StepCosts()
    for rows in range(1, 12):
        costs.took(rows, 1.0)
    (length,) = choose_lengths(costs, [0.8], [MOST], 0, [True], round_cost)
    tokens = [sum(0.8**place for place in range(n + 1)) / (1 + round_cost * n) for n in range(MOST + 1)]
    assert length == int(np.argmax(tokens))


def test_drafts_that_are_looked_up_take_no_rounds() -> None:
    costs = StepCosts()
    for rows in range(1, 30):
        costs.took(rows, 1.0)
    looked_up, guessed = choose_lengths(costs, [0.7, 0.7], [MOST, MOST], 0, [False, True], 0.5)
    assert looked_up == MOST
    assert guessed < 2


def test_the_gain_of_a_source_is_what_its_best_length_brings() -> None:
    for rate, share in ((0.8, 0.1), (0.5, 0.3), (0.2, 0.4), (0.9, 0.0)):
        best = max(sum(rate**j for j in range(1, n + 1)) - share * n for n in range(MOST + 1))
        assert gain(rate, MOST, share) == pytest.approx(best)
    assert gain(0.0, MOST, 0.1) == 0.0


def test_a_round_costs_by_the_models_size_until_one_was_measured() -> None:
    steps, rounds = StepCosts(), RoundCosts(0.1)
    for _ in range(9):
        steps.took(1, 0.020)
    assert rounds.of(1, steps) == pytest.approx(0.1 * float(steps.of(np.array([1]))[0]))
    for _ in range(9):
        rounds.took(1, 0.001)
    assert rounds.of(1, steps) * steps.unit_s == pytest.approx(0.001)
