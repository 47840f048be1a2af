"""The steps of a node's engine, one after the other, and what follows one that fails.

Owns: when a step is made and of whom, and the conclusion that the engine
is broken. Which requests are suspected of a failure is suspects.py's.

While a step is computed the next one is planned and submitted (`async_scheduling`), so that the device
does not wait for the books: shortly before the end, so that what arrives until then is in it.

A step that fails takes nobody with it: its sequences are computed again, from then on each request by
itself, until one fails alone, which ends with `PoisonedRequest`, or all have passed. After each failure
the engine computes one token of nobody: if it cannot, or its device says that nothing can be computed
any more, or a step does not come back within the stall limit, the process ends at once (`EngineBroken`)
and its gateways try what ran here elsewhere: those of the step by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections import deque
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
from common.node.step_times import StepTimes

log = get_logger("steps")

LOOKS = 10  # within the stall limit, whether a step has ended
BLOCKED_WAIT_S = 0.005  # until the engine looks again whether a lease has ended


@dataclasses.dataclass(slots=True, eq=False)
class _UnderWay:
    step: Step
    alone: str  # whose step of its own it is, or ""
    result: asyncio.Future[StepResult]
    begun: float = 0.0


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
        times: StepTimes | None = None,
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
        self._under_way: deque[_UnderWay] = deque()  # submitted, the older first; two at most
        self._not_built: StepNotBuilt | None = None  # a step that was to follow the one under way
        self._times = times or StepTimes()
        wanted = node.engine.settings.async_scheduling
        self._plans_ahead = not node.engine.facts.on_host if wanted is None else wanted

    def wake(self) -> None:
        self._work.set()

    async def run(self) -> None:
        """Until cancelled; `EngineBroken` when the process has to end."""
        while True:
            self._work.clear()
            self._node.links.room_changed()
            if not self._under_way and not await self._begin():
                await self._idle()
                continue
            await self._end_first()
            if self._not_built is not None:
                error, self._not_built = self._not_built, None
                await self._failed("", error.step, error.__cause__ or error)

    async def _begin(self) -> bool:
        """Submit a step while none is under way; False when there is nothing to compute."""
        alone, step = await self._plan() if self._engine.has_work else ("", None)
        if step is None:
            return False
        self.computing = True
        await self._announce(alone and f"{alone}@{_reached(step, max)[alone]}")
        self._submit(alone, step)
        return True

    async def _idle(self) -> None:
        self.computing = False
        await self._announce("")
        timeout = BLOCKED_WAIT_S if self._engine.has_work else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._work.wait()

    def _submit(self, alone: str, step: Step) -> None:
        result = asyncio.wrap_future(self._engine.runner.submit(step.input, self._when_filled(step)))
        self._under_way.append(_UnderWay(step, alone, result))
        if len(self._under_way) == 1:
            self._first_begins()

    def _first_begins(self) -> None:
        first = self._under_way[0]
        first.begun = time.monotonic()
        self._role.step_begins(first.step)

    async def _end_first(self) -> None:
        """See the step under way to its end; meanwhile the next is planned."""
        first, engine = self._under_way[0], self._engine
        try:
            if self._plans_ahead and not first.alone and self._times.knows(first.step):
                await asyncio.wait((first.result,), timeout=self._times.until_due(first.step))
                if not first.result.done():
                    self._plan_ahead()
            result = await self._outcome(first.result)
        except Exception as error:
            await self._fail_all(first, error)
            return
        seconds = time.monotonic() - first.begun
        self._times.took(first.step, seconds)
        self._under_way.popleft()
        try:
            outputs = engine.commit(first.step, result)
            self._role.step_ended(first.step, outputs)
        except Exception as error:  # what is half taken in cannot be computed again
            log.error("step.not_taken_in", error=repr(error), alone=first.alone, exc_info=error)
            self._end(first.alone, first.step, error)
        if self._under_way:
            self._first_begins()
        if self._metrics is not None:
            generated = sum(len(output.token_ids) for output in outputs)
            self._metrics.step_ended(first.step, seconds, generated, len(result.spoiled))
        self.suspects.passed(first.alone, _reached(first.step, min))
        for request in self.suspects:
            if not engine.scheduler.is_open(request):
                self.suspects.forget(request)
        self._room_changed()

    def _plan_ahead(self) -> None:
        """Submit the step that follows the one under way, of what does not depend on how that ends; none
        while there are suspects, whose turns do."""
        if self.suspects:
            return
        role = self._role
        try:
            step = self._engine.plan(lambda sequence: not sequence.in_flight or role.may_go_on(sequence))
        except StepNotBuilt as error:
            self._not_built = error
            return
        if step is not None:
            self._submit("", step)

    async def _fail_all(self, first: _UnderWay, error: Exception) -> None:
        """The older step failed, or what was to follow it. All that was submitted is waited for, for until
        then it may write; the runner refuses what goes on from a step that failed."""
        for one in self._under_way if not self.hangs else ():
            with contextlib.suppress(Exception):
                await self._outcome(one.result)
        self._under_way.clear()
        self._engine.fail(first.step)
        await self._failed(first.alone, first.step, error)

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

    async def _outcome(self, computing: asyncio.Future[StepResult]) -> StepResult:
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
            for chunk in self._role.handed_off(step)
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
            await self._outcome(asyncio.wrap_future(self._engine.runner.submit(step.input)))
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
