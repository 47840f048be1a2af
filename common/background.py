"""What becomes of an error in a task that nobody awaits: the event loop's exception handler hears of it at
once, as it does of errors in timers and other callbacks. So a process decides in one place what follows
from an error that nobody thought of (common/node/app.py, gateway/server.py). asyncio tells the same handler
of errors of sockets, with which it deals itself, and of errors that nobody has looked at when they are
collected as garbage: these are for the log only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any


def is_a_failure(context: Mapping[str, Any]) -> bool:
    """Whether what the handler is told of is an error in a callback or in a task that was reported: what it
    was about is in an unknown state."""
    return "exception" in context and ("handle" in context or "task" in context)


def report(task: asyncio.Task[Any]) -> None:
    """For `add_done_callback` of such a task."""
    if not task.cancelled() and (error := task.exception()) is not None:
        message = f"the task {task.get_name()} failed"
        task.get_loop().call_exception_handler({"message": message, "exception": error, "task": task})
