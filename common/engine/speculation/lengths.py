"""How many tokens to draft for each sequence of a step, so that a token costs the least time.

Owns two estimates, both fitted to the steps as they run: what a step of so many rows costs beside one of
others, and how often a draft of each sequence is right. `n` sequences with `r` drafted rows in all give

    n + sum over their drafts of a^j        tokens, where a is the sequence's acceptance, j the draft's place

in `cost(n + r)`, and in a round of the draft model for each place for which it drafts. Rows are added in the
order of their worth, a^j, and as many as make tokens per time greatest: none where another row costs more
than it brings. This is the goodput of SmartSpec (Liu et al. 2024) and TurboSpec (Liu et al. 2025), with costs
by size instead of a line, for a device's kernels cost the same from one row to sixteen and twice as much at
seventeen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as AnySequence

import numpy as np
from numpy.typing import NDArray

SIZES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 192, 256, 384, 512, 1024])
GROWTH = 0.1  # exponent: sizes that were never computed are taken to cost little more, and so are tried
SLOPE = 0.7  # of what a row costs on average in those sizes that were, for larger ones
REHEARSED = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 48, 64)  # rows of steps that are measured at the start
SCALE_WEIGHT = 0.3  # of the newest step in the level of all costs, which moves with the length of contexts
SHAPE_WEIGHT = 0.3  # of the newest step in what its size costs beside others
FADING = 0.9998  # of a size's cost with each smaller step: one that was slow once is tried again

OUTLIER = 10.0  # times more or less than expected: says nothing of a size
MANY_OUTLIERS = 3  # in succession

MARGIN = 0.03  # drafts have to promise so much more, for estimates are not exact
PRIOR_WEIGHT = 2.0  # drafts that a prior counts as
MEMORY = 0.95  # of what was measured, with each step that has drafts of a sequence
IDLE_MEMORY = 0.99  # with each that has none: what was turned off is tried again


class StepCosts:
    """The relative cost of steps that only generate, by their rows."""

    def __init__(self) -> None:
        self._shape = np.zeros(len(SIZES))  # relative cost of each size; 0: never computed
        self._scale = 0.0
        self._outliers = 0  # in succession

    def took(self, rows: int, seconds: float) -> bool:
        """Learn from a step; not from a clock that says what cannot be, nor from a step that took far more
        or less than any other, unless several in succession do. Whether it was believed."""
        if rows < 1 or not 0 < seconds < math.inf:
            return False
        at = min(int(np.searchsorted(SIZES, rows)), len(SIZES) - 1)
        if not self._scale:
            self._scale, self._shape[at] = seconds, 1.0
            return True
        least, most = self._expected(at)
        cost = seconds / self._scale
        if not least / OUTLIER <= cost <= most * OUTLIER:
            self._outliers += 1
            if self._outliers < MANY_OUTLIERS:
                return False
            self._scale = seconds / min(max(cost, least), most)  # so much has changed for all sizes
        self._outliers = 0
        if not self._shape[at]:
            self._shape[at] = seconds / self._scale
            return True
        self._scale += SCALE_WEIGHT * (seconds / self._shape[at] - self._scale)
        self._shape[at] += SHAPE_WEIGHT * (seconds / self._scale - self._shape[at])
        self._shape[at + 1 :] *= FADING
        return True

    def _expected(self, at: int) -> tuple[float, float]:
        """Between what a size may cost: what it did, or by the nearest that is known, at most as many times
        more or less as it has more or fewer rows."""
        known = np.flatnonzero(self._shape)
        near = known[np.argmin(np.abs(known - at))]
        cost, ratio = float(self._shape[near]), float(SIZES[at] / SIZES[near])
        return cost * min(1.0, ratio), cost * max(1.0, ratio)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What steps of so many rows cost, `[len(rows)]`, in a unit of their own; never less for more
        rows. A size that was never computed is taken to cost as little as it may: little more than the
        next smaller one that was, or its share of the smallest; beyond the largest, not much less than they
        grow."""
        costs = self._shape.copy()
        known = np.flatnonzero(costs)
        if not len(known):
            costs[:] = SIZES**GROWTH
        else:
            costs[known] = np.minimum.accumulate(costs[known][::-1])[::-1]
            below = known[np.maximum(np.searchsorted(known, np.arange(len(costs)), "right") - 1, 0)]
            factor = SIZES / SIZES[below]
            grown = costs[below] * np.where(factor > 1, factor**GROWTH, factor)
            first, last = known[[0, -1]]
            if first < last:
                slope = (costs[last] - costs[first]) / (SIZES[last] - SIZES[first])
                grown[last:] = np.maximum(
                    grown[last:], costs[last] + SLOPE * slope * (SIZES[last:] - SIZES[last])
                )
            costs = np.where(costs > 0, costs, grown)
            costs = np.minimum.accumulate(costs[::-1])[::-1]
        at = np.minimum(np.searchsorted(SIZES, rows), len(SIZES) - 1)
        found: NDArray[np.float64] = costs[at]
        return found

    @property
    def unit_s(self) -> float:
        """Of `of`; 0 before any step."""
        return self._scale


class RoundCosts:
    """What a round of the draft model costs, a token for each of so many sequences: until one was computed,
    `relative_size` of what a step of the model costs."""

    def __init__(self, relative_size: float) -> None:
        self._relative_size = relative_size
        self._costs = StepCosts()

    def took(self, members: int, seconds: float) -> None:
        self._costs.took(members, seconds)

    def of(self, members: int, steps: StepCosts) -> float:
        """In the unit of `steps`."""
        own, unit = self._costs, steps.unit_s
        rows = np.array([max(1, members)])
        if own.unit_s and unit:
            return float(own.of(rows)[0]) * own.unit_s / unit
        return float(steps.of(rows)[0]) * self._relative_size


class Acceptance:
    """How often the drafts of one sequence are right, up to the first that is not."""

    def __init__(self) -> None:
        self._right = self._tried = 0.0

    def rate(self, prior: float) -> float:
        return (self._right + PRIOR_WEIGHT * prior) / (self._tried + PRIOR_WEIGHT)

    def observe(self, drafted: int, accepted: int) -> None:
        memory = MEMORY if drafted else IDLE_MEMORY
        self._right = self._right * memory + accepted
        self._tried = self._tried * memory + accepted + (accepted < drafted)


def gain(rate: float, most: int, share: float) -> float:
    """Tokens to expect of the best number of drafts up to `most`, less what they cost: each `share` of what
    a token takes without. `rate` is below 1."""
    count = most
    if share > 0.0:
        count = min(most, max(0, math.floor(math.log(share) / math.log(rate)))) if rate > 0.0 else 0
    return rate * (1.0 - rate**count) / (1.0 - rate) - share * count


def choose_lengths(
    costs: StepCosts,
    rates: AnySequence[float],
    available: AnySequence[int],
    beside: int,
    by_model: AnySequence[bool] = (),
    round_cost: float = 0.0,
) -> list[int]:
    """How many of its `available` drafts each sequence should have; `beside` sequences have none to choose
    of. `rates` are below 1. The drafts of those `by_model` take a round for each place, which costs
    `round_cost` in the unit of `costs`."""
    most = max(available, default=0)
    if not most:
        return [0] * len(available)
    places = np.arange(1, most + 1)
    worth = np.asarray(rates)[:, None] ** places
    worth[places > np.asarray(available)[:, None]] = 0.0
    guessed = np.asarray(by_model or [False] * len(available), np.bool_)
    most_rounds = int(np.asarray(available)[guessed].max(initial=0)) if round_cost else 0
    base = len(available) + beside
    order = np.argsort(-worth, axis=None, kind="stable")[: np.count_nonzero(worth)]
    worths = worth.ravel()[order]
    rounds_of = np.where(guessed[:, None] & bool(round_cost), places, 0).ravel()[order]
    sizes = costs.of(base + np.arange(len(order) + 1))
    best, taken = (1 + MARGIN) * base / float(sizes[0]), order[:0]
    for rounds in range(most_rounds + 1):
        if base + worths.sum() <= best * (float(sizes[min(1, len(order))]) + round_cost * rounds):
            break  # nor do more rounds pay
        allowed = np.flatnonzero(rounds_of <= rounds)
        if not len(allowed):
            continue
        tokens = base + np.cumsum(worths[allowed])
        goodput = tokens / (sizes[1 : len(allowed) + 1] + round_cost * rounds)
        at = int(np.argmax(goodput))
        if goodput[at] > best:
            best, taken = float(goodput[at]), order[allowed[: at + 1]]
    lengths: list[int] = np.bincount(taken // most, minlength=len(available)).tolist()
    return lengths
