"""A real node that dies of a marked prompt: `python -m tests.support.poisoned_node`, flags as a node's.

As if a kernel crashed the process: no exception, no goodbye, in the middle of the step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import common.node.runtime as runtime
from common.engine import Engine
from common.engine.engine import ComputedStep, PlannedStep
from common.node.__main__ import main

MARK = 7
POISON = [1, *[MARK] * 20]


class PoisonedEngine(Engine):
    def compute(
        self, planned: PlannedStep, filled: Callable[[frozenset[int]], None] | None = None
    ) -> ComputedStep:
        if (planned.batch.rows.token_ids == MARK).sum() >= 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(planned, filled)


if __name__ == "__main__":
    runtime.Engine = PoisonedEngine  # type: ignore[misc]
    sys.exit(main())
