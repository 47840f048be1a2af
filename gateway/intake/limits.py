"""What a body may take of the processes that work on it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Times in seconds; a process that is killed answers nothing, its client gets an error."""

    processor_s: float = 10.0  # processor time that one body may take
    memory_bytes: int = 2**30  # address space that a worker may have beyond what it begins with
    growth_bytes: int = 2**27  # a worker that has grown by so much makes way for a fresh one
    waiting: int = 64  # bodies in one lane
    idle_s: float = 60.0  # a worker that is not needed ends
    wall_s: float = 60.0  # a worker that gives no answer for so long is killed
    spare_wall_s: float = 300.0  # one that works in spare time


INTAKE_LIMITS = IntakeLimits()
