"""A runner in a thread of its own, so that its owner's thread goes on while a step is computed, or given to a
device that computes it later.

The thread makes the runner, too: OpenMP keeps a team for each thread that ever ran a parallel region,
and with two of them it waits at every barrier asleep, not spinning.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from common.engine.interface import EngineFacts, Filled, Runner, StepInput, StepResult
from common.errors import EngineBroken


class ThreadRunner:
    """Implements `Runner`. What `make` raises is raised here, and no thread is left."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._thread = ThreadPoolExecutor(1, "engine")
        try:
            self.inner = self._thread.submit(make).result()
        except BaseException:
            self._thread.shutdown()
            raise

    @property
    def facts(self) -> EngineFacts:
        return self.inner.facts

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self._thread.submit(self._submit, step, filled, future)
        return future

    def is_lost(self, error: BaseException, /) -> bool:
        return self.inner.is_lost(error)

    def close(self, within_s: float | None = None) -> None:
        """`EngineBroken` if it takes longer: then nothing is freed, for the thread may still write."""
        until = None if within_s is None else time.monotonic() + within_s
        _, late = wait([self._thread.submit(_nothing)], within_s)
        if late:
            raise EngineBroken(f"a step under way did not end within {within_s:g} s")
        self._thread.shutdown()
        self.inner.close(None if until is None else max(0.0, until - time.monotonic()))

    def _submit(self, step: StepInput, filled: Filled | None, future: Future[StepResult]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            computing = self.inner.submit(step, filled)
        except BaseException as error:
            future.set_exception(error)
        else:
            computing.add_done_callback(functools.partial(_pass_on, future))


def _pass_on(to: Future[StepResult], done: Future[StepResult]) -> None:
    error = done.exception()
    if error is None:
        to.set_result(done.result())
    else:
        to.set_exception(error)


def _nothing() -> None: ...
