"""The steps of a node's engine, one after the other, and what follows one that fails.

Owns: when a step is made and of whom, and the conclusion that the engine
is broken. Which requests are suspected of a failure is suspects.py's.

A step that fails takes nobody with it: its sequences are computed again, from then on each request by
itself, until one fails alone, which ends with `PoisonedRequest`, or all have passed. After each failure
the engine computes one token of nobody: if it cannot, or its device says that nothing can be computed
any more, or a step does not come back within the stall limit, the process ends at once (`EngineBroken`)
and its gateways try what ran here elsewhere: those of the step by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn

from common.engine.core.engine_core import StepNotBuilt
from common.engine.core.sequence import Sequence
from common.engine.core.step import Step
from common.engine.interface import StepResult
from common.errors import EngineBroken, OutOfBlocks, PoisonedRequest
from common.logs import get_logger
from common.node.metrics import NodeMetrics
from common.node.ports import NodeRole, NodeServices

log = get_logger("steps")

LOOKS = 10  # within the stall limit, whether a step has ended
BLOCKED_WAIT_S = 0.005  # until the engine looks again whether a lease has ended


class Steps:
    """`run` it; `wake` it when there may be work. `stall_limit_s` bounds one step."""

    def __init__(
        self,
        node: NodeServices,
        role: NodeRole,
        *,
        stall_limit_s: float,
        say_alone: Callable[[str], Awaitable[None]],
        room_changed: Callable[[], None],
        metrics: NodeMetrics | None = None,
    ) -> None:
        """`say_alone` announces whose step of its own comes next, "" after it; `room_changed` hears that
        there may be room for another entry."""
        self._metrics = metrics
        self.suspects = node.suspects
        self.computing = False
        self.hangs = False  # a step does not come back: the thread can never be waited for
        self.alone = ""  # as `NodeRecord.alone`
        self._node, self._role, self._engine = node, role, node.engine
        self._say_alone, self._room_changed = say_alone, room_changed
        self._stall_limit_s = stall_limit_s
        self._work = asyncio.Event()

    def wake(self) -> None:
        self._work.set()

    async def run(self) -> None:
        """Until cancelled; `EngineBroken` when the process has to end."""
        node, engine = self._node, self._engine
        while True:
            self._work.clear()
            node.links.room_changed()
            alone, step = await self._plan() if engine.has_work else ("", None)
            if step is None:
                self.computing = False
                await self._announce("")
                timeout = BLOCKED_WAIT_S if engine.has_work else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await self._work.wait()
                continue
            self.computing = True
            await self._announce(alone and f"{alone}@{_reached(step, max)[alone]}")
            self._role.step_begins(step)
            begun = time.monotonic()
            try:
                result = await self._compute(step)
            except Exception as error:
                engine.fail(step)
                await self._failed(alone, step, error)
                continue
            seconds = time.monotonic() - begun
            try:
                outputs = engine.commit(step, result)
                self._role.step_ended(step, outputs)
            except Exception as error:  # what is half taken in cannot be computed again
                log.error("step.not_taken_in", error=repr(error), alone=alone, exc_info=error)
                self._end(alone, step, error)
            if self._metrics is not None:
                generated = sum(len(output.token_ids) for output in outputs)
                self._metrics.step_ended(step, seconds, generated, len(result.spoiled))
            self.suspects.passed(alone, _reached(step, min))
            for request in self.suspects:
                if not engine.scheduler.is_open(request):
                    self.suspects.forget(request)
            self._room_changed()

    async def _announce(self, alone: str) -> None:
        """Whose step of its own is computed from now on, and up to where: a node that is killed while
        it computes nothing, or others, speaks against nobody."""
        if alone != self.alone:
            self.alone = alone
            await self._say_alone(alone)

    async def _plan(self) -> tuple[str, Step | None]:
        """The next step that can be made, if any can, and whose own it is."""
        for alone in self.suspects.turns():
            try:
                step = self._engine.plan(self._members(alone))
            except StepNotBuilt as error:
                await self._failed(alone, error.step, error.__cause__ or error)
                break
            if step is not None:
                return alone, step
        return "", None

    def _members(self, alone: str) -> Callable[[Sequence], bool] | None:
        suspects = self.suspects
        if alone:
            return lambda sequence: sequence.request_id == alone
        return (lambda sequence: sequence.request_id not in suspects) if suspects else None

    async def _compute(self, step: Step) -> StepResult:
        filled = self._when_filled(step)
        computing = asyncio.wrap_future(self._engine.runner.submit(step.input, filled))
        for _ in range(LOOKS):  # of a process that was stopped, one look only passes meanwhile
            await asyncio.wait((computing,), timeout=self._stall_limit_s / LOOKS)
            if computing.done():
                return computing.result()
        self.hangs = True
        raise EngineBroken(f"a step took longer than {self._stall_limit_s:g} s")

    def _when_filled(self, step: Step) -> Callable[[frozenset[int]], None] | None:
        """What the engine's thread does once the blocks of a step hold their KV: seal those that
        go to another node, and have the role say so while the step's tokens are chosen."""
        seals = {
            chunk.sequence.sequence_id: (chunk, self._node.kv.seals(chunk))
            for chunk in self._role.handed_over(step)
        }
        if not any(of_one for _, of_one in seals.values()):
            return None
        loop = asyncio.get_running_loop()

        def filled(spoiled: frozenset[int]) -> None:
            sound = [seals[name] for name in seals if name not in spoiled]
            for _, of_one in sound:
                self._node.kv.seal(of_one)
            loop.call_soon_threadsafe(self._role.step_filled, [chunk for chunk, _ in sound])

        return filled

    async def _failed(self, alone: str, step: Step, error: BaseException) -> None:
        if self._metrics is not None:
            self._metrics.step_failed()
        members = _reached(step, max)
        log.error("step.failed", error=repr(error), requests=len(members), alone=alone, exc_info=error)
        lost = self.hangs or self._engine.runner.is_lost(error)
        if not lost and await self._computes():
            guilty = self.suspects.failed(alone, members)
            if guilty:
                self._convict(guilty, error)
                return
            if not self.suspects.unexplained:
                return
        self._end(alone, step, error)

    def _end(self, alone: str, step: Step, error: BaseException) -> NoReturn:
        """The engine is broken: its process ends, and says to whom it may have been due."""
        for request in _reached(step, max):
            if request == alone:
                self._convict(request, error)
            else:
                broken = EngineBroken("the engine broke in a step that had this request in it")
                self._role.give_up(request, broken, retryable=True)
        raise EngineBroken(f"the engine is broken: {error!r}") from error

    def _convict(self, request: str, error: BaseException) -> None:
        self._role.give_up(
            request,
            PoisonedRequest(
                f"computing it fails ({type(error).__name__}), with nothing else computed beside it"
            ),
            retryable=False,
        )
        self.suspects.forget(request)

    async def _computes(self) -> bool:
        """Whether the engine can compute a token of nobody."""
        try:
            step = self._engine.plan_probe()
        except OutOfBlocks:
            return True  # there is no room to find out: the next steps will tell
        try:
            await self._compute(step)
        except Exception as error:
            log.error("probe.failed", error=repr(error))
            return False
        finally:
            self._engine.end_probe(step)
        return True


def _reached(step: Step, of_choices: Callable[[Iterable[int]], int]) -> dict[str, int]:
    """Of each request in the step, where its chunks end: the position of one of its choices."""
    ends: dict[str, list[int]] = {}
    for chunk in itertools.chain(step.chunks, step.forked):
        ends.setdefault(chunk.sequence.request_id, []).append(chunk.end)
    return {request: of_choices(found) for request, found in ends.items()}
