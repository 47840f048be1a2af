"""A runner in a thread of its own, so that its owner's thread goes on while a step is computed.

The thread makes the runner, too: OpenMP keeps a team for each thread that ever ran a parallel region,
and with two of them it waits at every barrier asleep, not spinning.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from common.engine.interface import EngineFacts, Filled, Runner, StepInput, StepResult


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
        return self._thread.submit(self._run, step, filled)

    def is_lost(self, error: BaseException, /) -> bool:
        return self.inner.is_lost(error)

    def close(self) -> None:
        self._thread.shutdown()
        self.inner.close()

    def _run(self, step: StepInput, filled: Filled | None) -> StepResult:
        return self.inner.submit(step, filled).result()
