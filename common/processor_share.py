"""Which process goes first where several want the same processor.

Owns: niceness, and the share of a session. Linux shares processors among sessions before it looks at
the processes of one (sched(7), autogroup), and among containers before that. So processes that serve
together are in one session, where niceness counts; who should get what they leave over has a session
of its own with a small share, and the lowest niceness for where there are no such shares.
"""

from __future__ import annotations

import os
import time

BESIDE_GATEWAY = 5
"""The niceness of a node on the processors of its gateway, which needs little, and that at once. A step
of several milliseconds does not feel it; a gateway that waits for one step after the other keeps
everybody's tokens waiting."""

NICE, NICEST = 10, 19
TRIES, PAUSE_S = 3, 0.11  # the system takes one change of a session's share in 0.1 s


def leave(*, idle: bool) -> None:
    """Let everybody else go first, from a session of our own; with `idle` whoever wants a processor.

    Threads of a step wait for each other: who takes one of their processors costs them far more than
    its share."""
    os.setsid()
    set_share_of_session(NICEST if idle else NICE)
    os.nice(NICE)
    if idle:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a sandbox may forbid it
            os.nice(NICEST - NICE)


def set_share_of_session(niceness: int) -> None:
    """Give the session of this process the share that `niceness` stands for, where there are such shares
    and we may: one below 0 takes a privilege."""
    for _ in range(TRIES):
        try:
            with open("/proc/self/autogroup", "w") as file:
                file.write(str(niceness))
        except BlockingIOError:  # somebody on this machine has just done the same
            time.sleep(PAUSE_S)
        except OSError:
            return
        else:
            return
