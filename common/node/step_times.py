"""Estimates how long a step takes, so that the next one is planned shortly before it ends.

Owns the times of the last steps by their size, in powers of two. If an estimate is too long, the next
step is planned when this one has ended; if it is too short, what arrives meanwhile waits one step more.
"""

from __future__ import annotations

from common.engine.core.step import Step

LEAD_S = 0.003  # planning and submitting take about this long
LEAD_PART = 0.1  # of a step's time: steps of one size differ by so much
WEIGHT = 0.3  # of the newest step


class StepTimes:
    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}  # by size

    def took(self, step: Step, seconds: float) -> None:
        before = self._seconds.get(_size(step), seconds)
        self._seconds[_size(step)] = before + WEIGHT * (seconds - before)

    def knows(self, step: Step) -> bool:
        """Whether a step of this size was computed before."""
        return _size(step) in self._seconds

    def until_due(self, step: Step) -> float:
        """Seconds from the start of a step of known size until the next one should be planned."""
        return max(0.0, self._seconds[_size(step)] * (1 - LEAD_PART) - LEAD_S)


def _size(step: Step) -> tuple[int, int]:
    return step.num_generated_tokens.bit_length(), step.num_prompt_tokens.bit_length()
