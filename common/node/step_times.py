"""How long steps take, as far as it matters to when the next one is planned.

Owns the times of the last steps by their size, in powers of two. An estimate that is too long means that
the next step is planned when this one has ended; one that is too short, that what arrives meanwhile
waits for one step more.
"""

from __future__ import annotations

from common.engine.core.step import Step

LEAD_S = 0.003  # planning and handing over take about this long
LEAD_PART = 0.1  # of a step's time, by which it may differ from that of others like it
WEIGHT = 0.3  # of the newest


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
