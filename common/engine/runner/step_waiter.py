"""The thread that waits for a device, one step after the other, asleep, and resolves the steps' futures.

What fails takes along what goes on from it. A future fails no earlier than everything that the queue was
given has ended: until then kernels may write into blocks that somebody else would be given. If not even that
can be waited for, the device is lost, and the error says so.

Owns the thread. Knows nothing of what a step computes, and holds no model.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from concurrent.futures import Future

from common.engine.devices.queue import DeviceQueue
from common.engine.interface import Filled, StepResult
from common.engine.runner.step_memory import StepMemories, StepMemory
from common.engine.runner.step_results import StepResults
from common.engine.runner.under_way import UnderWay


class Run:
    """Steps of which each goes on from the one before."""

    def __init__(self) -> None:
        self.refuses = False  # whatever else is to follow: a step could not be given, or has failed
        self.has_failed = False  # a step that the thread has waited for


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What is waited for; with an `error`, any part of it may be in the queue."""

    run: Run
    future: Future[StepResult]
    filled: Filled | None
    memory: StepMemory | None  # none where the step got none
    under_way: UnderWay | None = None
    error: BaseException | None = None


class StepWaiter:
    def __init__(self, device_queue: DeviceQueue, memories: StepMemories) -> None:
        self._queue, self._memories = device_queue, memories
        self._results = StepResults()
        self._run: Run | None = None
        self._given: queue.SimpleQueue[Given | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="device", daemon=True)
        self._thread.start()

    def put(self, given: Given) -> None:
        self._given.put(given)

    def stop(self) -> None:
        """Once all that was put has been waited for."""
        self._given.put(None)

    def join(self, within_s: float | None) -> bool:
        """After `stop`: whether it has ended."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _wait(self) -> None:
        while (given := self._given.get()) is not None:
            if given.run is not self._run:
                self._results.forget()
                self._run = given.run
            try:
                result = self._result(given)
            except BaseException as error:
                given.run.refuses = given.run.has_failed = True
                fenced = self._fenced(error)
                self._give_back(given.memory)
                given.future.set_exception(fenced)
            else:
                self._give_back(given.memory)
                given.future.set_result(result)

    def _result(self, given: Given) -> StepResult:
        under_way, ids = given.under_way, None
        if under_way is None:
            assert given.error is not None
            raise given.error
        if given.run.has_failed:
            raise RuntimeError("the step before this one failed")
        if under_way.filled is not None:
            assert given.filled is not None
            under_way.filled.wait()
            ids = self._results.spoiled(under_way, under_way.memory.filled)
            given.filled(ids)
        assert under_way.done is not None
        under_way.done.wait()
        return self._results.result(under_way, ids)

    def _give_back(self, memory: StepMemory | None) -> None:
        if memory is not None:
            self._memories.give_back(memory)

    def _fenced(self, error: BaseException) -> BaseException:
        """The error, once nothing that the queue was given can write any more."""
        try:
            self._queue.synchronize()
        except Exception as worse:
            worse.__cause__ = error
            return worse
        return error
