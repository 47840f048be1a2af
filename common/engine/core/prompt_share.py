"""How many prompt tokens a step takes while others decode, so that these get their next tokens in time.

Owns what a step costs in seconds, fitted to the steps as they run, and the share of one step that prompts
get. Which prompts get it is the scheduler's. A step is its rows, and beside them the keys that its prompt
rows attend to:

    seconds(rows, pairs) = products(rows) + pair_s * pairs

`products` is a line through what steps of different sizes took: a device's kernels cost the same from one row
to some number, and grow with the rows from there. Sarathi-Serve (Agrawal et al. 2024) finds one number of
tokens for a given time between tokens, by profiling; here it follows each step. What tokens come out never
depends on how prompts are cut (numerics rule).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left

KEYS_PER_ROW = 4096.0  # attention to so many keys is taken to cost what a row's products do, until measured
SIZES_PER_DOUBLING = 2
WEIGHT = 0.3  # of the newest step in what its size costs
OUTLIER = 2.0  # times what is expected: a step counts as no slower than that
STALE = 1.25  # times its share of a smaller step just measured: nobody believes that a larger one takes more
LEAST_TOKENS = 64  # of prompts in a step, whatever it costs: they progress, and products are near their best
MULTIPLE = 16  # of tokens, where products take any number of rows


def pairs_of(start: int, length: int) -> float:
    """Keys that the rows `[start, start + length)` of a sequence see, all together."""
    return length * (start + (length + 1) / 2)


class StepSeconds:
    """What steps cost, by their rows and the pairs of their prompts."""

    def __init__(self) -> None:
        self._measured: dict[int, tuple[float, float]] = {}  # by size: rows, and seconds without pairs
        self._pair_s = 0.0
        self._points: list[tuple[float, float]] = []  # ascending in both

    def forget(self) -> None:
        self._measured, self._pair_s, self._points = {}, 0.0, []

    def took(self, rows: int, pairs: float, seconds: float) -> None:
        """Learn from a step. An error of the estimate belongs to both of its parts, each by its size."""
        if rows < 1 or not 0 < seconds < math.inf:
            return
        size = round(math.log2(rows) * SIZES_PER_DOUBLING)
        if pairs and not self._pair_s:
            self._pair_s = seconds / (rows * KEYS_PER_ROW + pairs)
        attention = self._pair_s * pairs
        if size not in self._measured:
            mean_rows, products = float(rows), max(seconds - attention, seconds / 10)
        else:
            expected = self.of(rows, pairs)
            error = WEIGHT * (min(seconds / expected, OUTLIER) - 1)
            self._pair_s *= 1 + error * attention / expected
            mean_rows, products = self._measured[size]
            mean_rows += WEIGHT * (rows - mean_rows)
            products += error * (expected - attention) * (expected - attention) / expected
        self._measured[size] = mean_rows, products
        self._fit_others(size)

    def _fit_others(self, size: int) -> None:
        """What was measured of other sizes may be of a time when the device was slower: a step takes hardly
        longer than several of fewer rows that have as many together, and no longer than one of more rows."""
        rows, seconds = self._measured[size]
        for other, (other_rows, other_seconds) in self._measured.items():
            most = STALE * seconds * other_rows / rows
            self._measured[other] = other_rows, min(other_seconds, most) if other > size else other_seconds
        least = math.inf
        self._points = []
        for other_rows, other_seconds in sorted(self._measured.values(), reverse=True):
            least = min(least, other_seconds)
            self._points.insert(0, (other_rows, least))

    def of(self, rows: float, pairs: float) -> float:
        """Seconds of a step; 0 before any was seen."""
        points = self._points
        if not points:
            return 0.0
        at = bisect_left(points, (rows, 0.0))
        if at == 0:
            products = points[0][1]
        elif at < len(points):
            (before, low), (after, high) = points[at - 1 : at + 1]
            products = low + (high - low) * (rows - before) / (after - before)
        else:
            (first, low), (last, high) = points[0], points[-1]
            slope = (high - low) / (last - first) if first < last else high / last
            products = high + slope * (rows - last)
        return products + self._pair_s * pairs


@dataclasses.dataclass(frozen=True, slots=True)
class DecodePace:
    """A step in which sequences decode should end within `target_s`. Where not all prompt tokens fit, it has
    a multiple of `multiple`, and never fewer than `least`."""

    target_s: float
    costs: StepSeconds
    multiple: int = MULTIPLE
    least: int = LEAST_TOKENS


class PromptShare:
    """What one step has left for prompts, `tokens` at most beside `decoding` rows; without a pace nobody
    decodes."""

    def __init__(self, tokens: int, decoding: int, pace: DecodePace | None) -> None:
        self._tokens, self._pace = tokens, pace
        self._decoding, self._given, self._pairs = decoding, 0, 0.0

    @property
    def is_spent(self) -> bool:
        return self._tokens <= 0

    def take(self, wanted: int, start: int) -> int:
        """How many of a sequence's positions from `start` on are in the step; after one that was cut short
        nothing is left."""
        length = min(wanted, self._tokens)
        if length <= 0:
            return 0
        if self._pace is not None and (fitting := self._fitting(self._pace, length, start)) < length:
            end = self._given + fitting
            multiple = self._pace.multiple
            least = -(-self._pace.least // multiple) * multiple
            most = max(end - end % multiple, least) - self._given
            length = max(0, min(length, most))
            if length < wanted:
                self._tokens = length
        self._tokens -= length
        self._given += length
        self._pairs += pairs_of(start, length)
        return length

    def _fitting(self, pace: DecodePace, wanted: int, start: int) -> int:
        """The most positions with which the step ends in time."""
        rows = self._decoding + self._given

        def is_late(length: int) -> bool:
            pairs = self._pairs + pairs_of(start, length)
            return pace.costs.of(rows + length, pairs) > pace.target_s

        return bisect_left(range(1, wanted + 1), True, key=is_late)
