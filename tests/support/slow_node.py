"""A chaotic node whose steps take as long as a larger model's: `python -m tests.support.slow_node`.

The flags and orders are those of chaotic_node.py. What a test wants to catch in the middle is then
still there when it looks.
"""

from __future__ import annotations

import time

from common.engine.interface import Filled, StepInput, StepResult
from common.engine.runner.model_runner import ModelRunner
from tests.support.chaotic_node import main

STEP_S = 0.01


class SlowRunner(ModelRunner):
    def run(self, step: StepInput, filled: Filled | None = None) -> StepResult:
        time.sleep(STEP_S)
        return super().run(step, filled)


if __name__ == "__main__":
    main(make_runner=SlowRunner)
