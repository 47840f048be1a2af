"""A real node that dies of one marked prompt, and hangs at another; flags as a node's.

As if a kernel crashed the process, without exception or goodbye, or never came back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from common.engine.interface import Filled, StepInput, StepResult
from common.engine.runner.model_runner import ModelRunner
from common.node.__main__ import main

KILLS, HANGS = ([1, *[mark] * 20] for mark in (7, 8))


class PoisonedRunner(ModelRunner):
    def run(self, step: StepInput, filled: Filled | None = None) -> StepResult:
        token_ids = step.token_ids
        if (token_ids == KILLS[-1]).sum() >= 16:
            os.kill(os.getpid(), signal.SIGKILL)
        if (token_ids == HANGS[-1]).sum() >= 16:
            threading.Event().wait()
        return super().run(step, filled)


if __name__ == "__main__":
    sys.exit(main(make_runner=PoisonedRunner))
