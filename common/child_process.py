"""A child process that does not outlive its parent, even by kill -9 of the parent (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> Callable[[], None]:
    """A function for the child to run between fork and exec; made before the fork, because after it
    nothing may be imported or locked. Does nothing where the system cannot."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
    kill = int(signal.SIGKILL)

    def run() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, kill, 0, 0, 0)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return run
