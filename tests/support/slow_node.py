"""A chaotic node whose steps take as long as a larger model's: `python -m tests.support.slow_node`.

The flags and orders are those of chaotic_node.py. What a test wants to catch in the middle is then
still there when it looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import common.node.runtime as runtime
from common.engine import Engine
from common.engine.engine import ComputedStep, PlannedStep
from tests.support.chaotic_node import main

STEP_S = 0.01


class SlowEngine(Engine):
    def compute(
        self, planned: PlannedStep, filled: Callable[[frozenset[int]], None] | None = None
    ) -> ComputedStep:
        time.sleep(STEP_S)
        return super().compute(planned, filled)


if __name__ == "__main__":
    runtime.Engine = SlowEngine  # type: ignore[misc]
    main()
