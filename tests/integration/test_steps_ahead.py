"""A node plans and submits the next step while one is computed: what is in it, and what a failure takes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from common.engine import Engine, SamplingParams
from common.engine.core.step import Chunk, Step
from common.engine.interface import Filled, StepInput, StepResult
from common.errors import EngineBroken
from common.node.step_times import StepTimes
from common.store.queue import Entry
from decode_node.role import DecodeRole
from kv_transfer.ports import Granted, Outcome
from prefill_node.role import PrefillRole
from tests.support.engines import poisoned_engine
from tests.support.redis import HANGS_S, a_dispatch
from tests.support.scripted_node import ScriptedNode, ended, key

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=3)


class AtOnce(StepTimes):
    """The next step is planned as soon as one has begun."""

    def knows(self, step: Step) -> bool:
        return True

    def until_due(self, step: Step) -> float:
        return 0.0


class PausedRunner:
    """As a thread, but each step is computed when the test says so."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.waiting: deque[tuple[StepInput, Filled | None, Future[StepResult]]] = deque()
        self.most = 0  # steps that waited at one time
        self.submitted: list[StepInput] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self.waiting.append((step, filled, future))
        self.most = max(self.most, len(self.waiting))
        self.submitted.append(step)
        return future

    def compute(self, error: Exception | None = None) -> None:
        """The oldest; with an error its KV is half written when it fails."""
        step, filled, future = self.waiting.popleft()
        try:
            result = self.inner.run(step, filled)
        except Exception as raised:
            future.set_exception(raised)
            return
        if error is None:
            future.set_result(result)
        else:
            self.inner._failed = True
            future.set_exception(error)


class Running:
    """The steps of a node with this role."""

    def __init__(
        self,
        role: Any = DecodeRole,
        *,
        ahead: bool | None = True,
        stall_limit_s: float = 60.0,
        **settings: Any,
    ) -> None:
        self.node = ScriptedNode(poisoned_engine(async_scheduling=ahead, **settings))
        self.runner = PausedRunner(self.node.engine.runner)
        self.node.engine.warm_up()
        self.node.engine.runner = self.runner  # type: ignore[assignment]
        self.role = role(self.node)
        self.node.run_role(self.role, stall_limit_s, times=AtOnce())
        self.steps = self.node.steps

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Afterwards nothing is left."""
        task = asyncio.create_task(self.steps.run())
        try:
            async with asyncio.timeout(HANGS_S):
                yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.node.engine.check_idle()

    async def submitted(self, count: int) -> None:
        """So many steps wait, and no more will before one is computed."""
        while len(self.runner.waiting) < count:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await self.settled()
        assert len(self.runner.waiting) == count

    async def settled(self) -> None:
        """What the node submits before another step is computed, it has submitted."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def to_the_end(self) -> None:
        while self.role.num_open or self.runner.waiting:
            await self.computed()

    async def computed(self) -> None:
        """One step, if there is one."""
        await self.settled()
        if self.runner.waiting:
            self.runner.compute()
        await self.settled()

    def accept(self, request: str, prompt: Sequence[int], **fields: Any) -> None:
        given = {"token_ids": tuple(prompt), "prompt_len": len(prompt), "params": PARAMS} | fields
        self.role.accept(Entry("1-0", a_dispatch(request, **given)))

    def tokens(self, request: str) -> tuple[int, ...]:
        return tuple(t for run in self.node.runs if run.request == request for t in run.token_ids)


def truth(engine: Engine, prompt: Sequence[int]) -> tuple[int, ...]:
    return engine.generate([list(prompt)], PARAMS)[0].token_ids


async def after_its_prompt(running: Running, prompts: dict[str, range]) -> None:
    """Their prompts are computed, and a step that generates has begun."""
    for name, prompt in prompts.items():
        running.accept(name, prompt)
    await running.submitted(1)
    running.runner.compute()


PROMPTS = {f"r-{n}": range(n, n + 20) for n in range(3)}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    engine = poisoned_engine()
    return {name: truth(engine, prompt) for name, prompt in PROMPTS.items()}


@pytest.mark.parametrize("ahead", [True, False, None])
async def test_the_next_step_waits_at_the_runner_and_the_tokens_are_the_same(
    ahead: bool | None, expected: dict[str, tuple[int, ...]]
) -> None:
    running = Running(ahead=ahead)
    async with running.running():
        for name, prompt in PROMPTS.items():
            running.accept(name, prompt)
        await running.to_the_end()
    assert running.runner.most == (2 if ahead else 1)
    assert {name: running.tokens(name) for name in PROMPTS} == expected


async def test_both_steps_of_a_failure_are_computed_again(expected: dict[str, tuple[int, ...]]) -> None:
    """The younger one, which goes on from what the failed one wrote, is refused by the runner."""
    running = Running()
    async with running.running():
        await after_its_prompt(running, PROMPTS)
        await running.submitted(2)
        running.runner.compute(RuntimeError("a kernel failed"))
        _, _, younger = running.runner.waiting[0]
        running.runner.compute()
        with pytest.raises(RuntimeError, match="the step before this one failed"):
            younger.result()
        await running.submitted(1)  # a token of nobody
        running.runner.compute()
        await running.submitted(1)
        assert set(running.node.suspects) == {f"{name}/1" for name in PROMPTS}
        await running.to_the_end()
    assert {name: running.tokens(name) for name in PROMPTS} == expected


async def test_there_is_no_step_ahead_while_somebody_is_suspected() -> None:
    running = Running()
    async with running.running():
        await after_its_prompt(running, PROMPTS)
        await running.submitted(2)
        running.node.suspects.suspect("r-1/1", 100)
        running.runner.compute()
        running.runner.compute()
        await running.settled()
        while running.node.suspects:
            (waiting,) = running.runner.waiting
            assert waiting[0].num_chunks in (1, 2), "the suspect alone, or the others"
            await running.computed()
        await running.to_the_end()


async def test_a_step_that_cannot_be_laid_out_is_a_failure_once_the_one_before_has_ended(
    expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running()
    engine = running.node.engine
    async with running.running():
        await after_its_prompt(running, PROMPTS)
        await running.submitted(2)
        with monkeypatch.context() as broken:
            broken.setattr(engine._slots, "changes", lambda: 1 / 0)
            running.runner.compute()
            await running.submitted(1)
            assert not running.node.suspects, "the step that is computed has not failed"
        running.runner.compute()
        await running.submitted(1)  # a token of nobody
        running.runner.compute()
        await running.submitted(1)
        assert set(running.node.suspects) == {f"{name}/1" for name in PROMPTS}
        await running.to_the_end()
    assert {name: running.tokens(name) for name in PROMPTS} == expected


async def test_a_sequence_that_is_to_move_is_left_out_until_no_step_has_it(
    expected: dict[str, tuple[int, ...]],
) -> None:
    running = Running()
    node = running.node
    async with running.running():
        node.decode_nodes("d1")
        await after_its_prompt(running, {"r-1": PROMPTS["r-1"]})
        await running.submitted(2)
        running.role.drain()
        await node.opened()
        assert not node.links.offers
        running.runner.compute()
        await running.submitted(1)
        running.runner.compute()
        while not node.links.offers:  # noqa: ASYNC110
            await asyncio.sleep(0)
        (offer,) = node.links.offers
        known = expected["r-1"]
        length = len(offer.request.token_ids)
        assert offer.request.token_ids == (*PROMPTS["r-1"], *known[: length - 20])
        assert node.links.next_tokens == [(length, known[length - 20])]
        node.links.tell(Granted(key("d1"), (0, 1)))
        node.links.tell(ended("d1", Outcome.ADOPTED))
    assert running.tokens("r-1") == known[: length - 19]


@pytest.mark.parametrize("delivered", [0, 5])
async def test_a_prompt_ends_at_a_prefill_node_with_its_first_new_token(
    delivered: int, expected: dict[str, tuple[int, ...]]
) -> None:
    """Also one that was delivered in part by another attempt, whose tokens are replayed."""
    running = Running(PrefillRole, max_num_batched_tokens=16)
    node = running.node
    async with running.running():
        node.decode_nodes("d1")
        for again in range(2):
            token_ids = (*PROMPTS["r-1"], *expected["r-1"][:delivered])
            salt = {"cache_salt": f"salt-{again}"}
            running.accept(f"p-{again}", token_ids, prompt_len=20, **salt)
            while not node.links.committed:
                await running.computed()
            (asked,) = node.links.committed
            node.links.committed.clear()
            node.links.tell(dataclasses.replace(ended("d1", Outcome.ADOPTED), key=asked))
            assert running.tokens(f"p-{again}") == expected["r-1"][delivered : delivered + 1]
        await running.to_the_end()
    assert running.runner.most == 2, "its chunks follow each other without a gap"


async def test_what_a_step_spoils_stays_spoiled_in_the_one_that_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own rows may be sound: the decode node would be told of blocks that are not."""
    running = Running(PrefillRole, max_num_batched_tokens=16)
    node, engine = running.node, running.node.engine
    announced: list[Chunk] = []
    monkeypatch.setattr(running.role, "step_filled", announced.extend)
    async with running.running():
        node.decode_nodes("d1")
        running.accept("p-1", range(100, 180))
        while len(announced) < 2:
            await running.computed()
        await running.submitted(2)
        before = len(announced)
        embedding = engine.runner.model._embedding
        with monkeypatch.context() as broken:
            spoiled = embedding.clone()
            spoiled[running.runner.waiting[0][0].token_ids[0]] = float("nan")
            broken.setattr(engine.runner.model, "_embedding", spoiled)
            running.runner.compute()
        (younger, _, result) = running.runner.waiting[0]
        monkeypatch.setattr("common.engine.runner.model_runner.spoiled", lambda *_: frozenset())
        monkeypatch.setattr("common.engine.runner.model_runner.infinite", lambda *_: frozenset())
        running.runner.compute()
        assert result.result().spoiled == set(younger.sequence_ids.tolist())
        await running.settled()
        assert len(announced) == before
        (cancelled,) = node.links.cancelled
        node.links.tell(dataclasses.replace(ended("d1", Outcome.CANCELLED), key=cancelled))


async def test_an_error_while_a_step_is_planned_ahead_waits_for_the_one_under_way(
    expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may write until it has ended: its blocks are nobody else's before."""
    running = Running()
    engine = running.node.engine
    async with running.running():
        await after_its_prompt(running, PROMPTS)
        await running.submitted(2)
        with monkeypatch.context() as broken:
            broken.setattr(running.role, "may_go_on", lambda sequence: 1 / 0)
            running.runner.compute()
            await running.submitted(1)
            assert engine.scheduler.num_running == len(PROMPTS)
        await running.to_the_end()
    assert {name: running.tokens(name) for name in PROMPTS} == expected


async def test_a_step_that_hangs_ends_the_node_though_another_waits_behind_it() -> None:
    running = Running(stall_limit_s=0.2)
    for name, prompt in PROMPTS.items():
        running.accept(name, prompt)
    compute = asyncio.create_task(running.steps.run())
    await running.submitted(1)
    running.runner.compute()
    await running.submitted(2)
    async with asyncio.timeout(HANGS_S):
        with pytest.raises(EngineBroken):
            await compute
    assert running.steps.hangs
