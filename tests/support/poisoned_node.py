"""A real node that dies of one marked prompt, and hangs at another; flags as a node's.

As if a kernel crashed the process, without exception or goodbye, or never came back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import common.node.runtime as runtime
from common.engine import Engine
from common.engine.engine import ComputedStep, PlannedStep
from common.node.__main__ import main

KILLS, HANGS = ([1, *[mark] * 20] for mark in (7, 8))


class PoisonedEngine(Engine):
    def compute(
        self, planned: PlannedStep, filled: Callable[[frozenset[int]], None] | None = None
    ) -> ComputedStep:
        token_ids = planned.batch.rows.token_ids
        if (token_ids == KILLS[-1]).sum() >= 16:
            os.kill(os.getpid(), signal.SIGKILL)
        if (token_ids == HANGS[-1]).sum() >= 16:
            threading.Event().wait()
        return super().compute(planned, filled)


if __name__ == "__main__":
    runtime.Engine = PoisonedEngine  # type: ignore[misc]
    sys.exit(main())
