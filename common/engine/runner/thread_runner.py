"""A runner in a thread of its own, so that its owner's thread goes on while a step is computed.

The thread makes the runner, too: OpenMP keeps a team for each thread that ever ran a parallel region,
and with two of them it waits at every barrier asleep, not spinning.
"""

from __future__ import annotations

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
        return self._thread.submit(self._run, step, filled)

    def is_lost(self, error: BaseException, /) -> bool:
        return self.inner.is_lost(error)

    def close(self, within_s: float | None = None) -> None:
        """`EngineBroken` if it takes longer: then nothing is freed, for the thread may still write."""
        _, late = wait([self._thread.submit(_nothing)], within_s)
        if late:
            raise EngineBroken(f"a step under way did not end within {within_s:g} s")
        self._thread.shutdown()
        self.inner.close()

    def _run(self, step: StepInput, filled: Filled | None) -> StepResult:
        return self.inner.submit(step, filled).result()


def _nothing() -> None: ...
