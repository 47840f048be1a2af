"""A request that makes the engine fail is found among the others, and ends alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
from torch import Tensor

from common.engine import SamplingParams
from common.engine.core.sequence import Sequence
from common.engine.core.step import Step
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import Rows
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.thread_runner import ThreadRunner
from common.errors import EngineBroken
from common.node.attempt import ALONE_TOKENS
from common.node.entries import Entries
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.queue import Entry
from common.wire.messages import Failed
from decode_node.role import DecodeRole
from tests.support.engines import poisoned_engine
from tests.support.redis import HANGS_S, a_dispatch
from tests.support.scripted_node import ScriptedNode

MARK = 499  # the token that the engine cannot compute
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, seed=3)
Fault = Callable[[Rows], None]


def prompt(number: int) -> tuple[int, ...]:
    return (1, *range(number + 3, number + 30))


def a_request(number: int, token_ids: tuple[int, ...], **fields: object) -> Entry:
    given = {"token_ids": token_ids, "prompt_len": len(token_ids), "params": PARAMS, **fields}
    return Entry(f"{number}-0", a_dispatch(f"r-{number}", **given))  # type: ignore[arg-type]


@contextlib.contextmanager
def faulty(runner: ModelRunner, fault: Fault) -> Iterator[None]:
    """`fault` looks at the rows of each step before they are computed."""
    original = runner.model.forward

    def forward(rows: Rows, cache: KVCache) -> Tensor:
        fault(rows)
        return original(rows, cache)

    runner.model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.model.forward = original  # type: ignore[method-assign]


def refuse_mark(rows: Rows) -> None:
    if (rows.token_ids == MARK).any():
        raise RuntimeError("a kernel failed")


class Running:
    """A decode node's role and steps on a real engine."""

    def __init__(self, stall_limit_s: float = 60.0, **settings: object) -> None:
        self.node = ScriptedNode(poisoned_engine(num_kv_blocks=512, async_scheduling=True, **settings))
        self.runner: Any = self.node.engine.runner
        self.node.engine.runner = ThreadRunner(lambda: self.runner)
        self.node.run_role(DecodeRole(self.node), stall_limit_s)

    async def until_idle(self) -> None:
        """All that was accepted has ended, or the engine is broken, which is raised."""
        running = asyncio.create_task(self.node.steps.run())
        try:
            while self.node.role.num_open and not running.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            if running.done():
                running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        self.node.engine.check_idle()
        assert not self.node.suspects

    def tokens(self, request: str) -> tuple[int, ...]:
        return tuple(t for run in self.node.runs if run.request == request for t in run.token_ids)

    @property
    def failures(self) -> list[tuple[str, str, bool]]:
        return [(m.request, m.code, m.retryable) for m in self.node.said if isinstance(m, Failed)]


async def test_one_of_64_fails_and_the_others_get_the_tokens_they_would_have_had() -> None:
    running = Running(max_num_seqs=64)
    prompts = {number: prompt(number) for number in range(64)}
    expected = {
        number: running.node.engine.generate([list(token_ids)], PARAMS)[0].token_ids
        for number, token_ids in prompts.items()
    }
    prompts[40] = (*prompts[40][:20], MARK, *prompts[40][20:])
    with faulty(running.runner, refuse_mark):
        for number, token_ids in prompts.items():
            running.node.role.accept(a_request(number, token_ids))
        await running.until_idle()
    assert running.failures == [("r-40", "poisoned_request", False)]
    for number in prompts:
        if number != 40:
            assert running.tokens(f"r-{number}") == expected[number]


async def test_a_poison_among_the_generated_tokens_is_found_too() -> None:
    running = Running(max_num_seqs=8)
    prompts = [(1, *range(3, 20 + 10 * number)) for number in range(8)]
    whole = running.node.engine.generate([list(token_ids) for token_ids in prompts], PARAMS)

    def fault(rows: Rows) -> None:
        """At the fourth generated position of one of them; the others have theirs elsewhere."""
        if (rows.positions[: rows.num_generated] == len(prompts[5]) + 3).any():
            raise RuntimeError("a kernel failed")

    with faulty(running.runner, fault):
        for number, token_ids in enumerate(prompts):
            running.node.role.accept(a_request(number, token_ids, prompt_len=len(token_ids)))
        await running.until_idle()
    assert running.failures == [("r-5", "poisoned_request", False)]
    assert running.tokens("r-5") == whole[5].token_ids[:4]
    assert all(running.tokens(f"r-{n}") == whole[n].token_ids for n in range(8) if n != 5)


async def test_a_request_whose_choices_share_the_poison_ends_with_all_of_them() -> None:
    running = Running(max_num_seqs=8)
    poison = (*prompt(1), MARK)
    with faulty(running.runner, refuse_mark):
        running.node.role.accept(a_request(0, prompt(0)))
        running.node.role.accept(a_request(1, poison, choices=(0, 1, 2), prompt_len=len(poison)))
        await running.until_idle()
    assert running.failures == [("r-1", "poisoned_request", False)] * 3
    assert len(running.tokens("r-0")) == PARAMS.max_tokens


@pytest.mark.parametrize("where", ["core", "runner"])
async def test_a_step_that_cannot_be_laid_out_is_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    running = Running(max_num_seqs=8)
    take, add = running.node.engine._slots.take, running.runner.sampler.add

    def refuse(sequence: Sequence) -> int:
        if sequence.params.seed == 666:
            raise MemoryError
        return take(sequence)

    def fail(slot: int, params: SamplingParams, *rest: Any, **fields: Any) -> None:
        if params.seed == 666:
            raise MemoryError
        add(slot, params, *rest, **fields)

    if where == "core":
        monkeypatch.setattr(running.node.engine._slots, "take", refuse)
    else:
        monkeypatch.setattr(running.runner.sampler, "add", fail)
    running.node.role.accept(a_request(0, prompt(0)))
    bad = SamplingParams(max_tokens=6, ignore_eos=True, seed=666)
    running.node.role.accept(a_request(1, prompt(1), params=bad))
    await running.until_idle()
    assert running.failures == [("r-1", "poisoned_request", False)]
    assert len(running.tokens("r-0")) == PARAMS.max_tokens


async def test_a_failure_that_does_not_come_again_fails_nobody() -> None:
    running = Running(max_num_seqs=8)
    expected = running.node.engine.generate([list(prompt(n)) for n in range(8)], PARAMS)
    times = iter((1, 4))
    step, next_failure = 0, next(times)

    def fault(rows: Rows) -> None:
        nonlocal step, next_failure
        step += 1
        if step == next_failure:
            next_failure = next(times, 0)
            raise RuntimeError("once")

    with faulty(running.runner, fault):
        for number in range(8):
            running.node.role.accept(a_request(number, prompt(number)))
        await running.until_idle()
    assert running.failures == []
    assert [running.tokens(f"r-{n}") for n in range(8)] == [c.token_ids for c in expected]


async def test_an_engine_that_computes_nothing_any_more_blames_nobody() -> None:
    running = Running()

    def fault(rows: Rows) -> None:
        raise RuntimeError("everything fails")

    with faulty(running.runner, fault):
        for number in range(3):
            running.node.role.accept(a_request(number, prompt(number)))
        with pytest.raises(EngineBroken):
            await running.until_idle()
    assert running.failures == [(f"r-{number}", "engine_broken", True) for number in range(3)]


@pytest.mark.parametrize("alone", [False, True])
async def test_a_device_that_is_lost_ends_the_node_at_once(
    monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """As after an illegal access on a GPU: nothing can be computed to see whose fault it was. One
    that was computed by itself, since it was suspected before, is guilty."""
    running = Running()
    monkeypatch.setattr(running.runner.device, "is_lost", lambda error: True)
    with faulty(running.runner, refuse_mark):
        running.node.role.accept(a_request(0, prompt(0)))
        running.node.role.accept(a_request(1, (*prompt(1), MARK), alone=alone))
        with pytest.raises(EngineBroken):
            await running.until_idle()
    if alone:
        assert running.failures == [("r-1", "poisoned_request", False)]
    else:
        assert running.failures == [(f"r-{n}", "engine_broken", True) for n in range(2)]


@pytest.mark.parametrize("alone", [False, True])
async def test_a_step_whose_outcome_cannot_be_taken_in_ends_the_node(alone: bool) -> None:
    """No kernel has failed, but what was computed is half in the books."""
    running = Running()
    scheduler: Any = running.node.engine.scheduler
    postprocess = scheduler.postprocess

    def fail(step: Step, accepted: object) -> object:
        if accepted and alone == (len(step.chunks) == 1):
            raise IndexError("a block that there is not")
        return postprocess(step, accepted)

    scheduler.postprocess = fail
    running.node.role.accept(a_request(0, prompt(0)))
    running.node.role.accept(a_request(1, prompt(1), alone=alone))
    steps = asyncio.create_task(running.node.steps.run())
    with pytest.raises(EngineBroken):
        await steps
    if alone:
        assert running.failures == [("r-1", "poisoned_request", False)]
    else:
        assert running.failures == [(f"r-{n}", "engine_broken", True) for n in range(2)]


async def test_a_step_that_hangs_ends_the_node_and_names_who_was_in_it() -> None:
    running = Running(stall_limit_s=0.2)
    released = threading.Event()

    def fault(rows: Rows) -> None:
        if (rows.token_ids == MARK).any():
            released.wait()

    with faulty(running.runner, fault):
        running.node.role.accept(a_request(0, (*prompt(1), MARK)))
        with pytest.raises(EngineBroken):
            await running.until_idle()
        released.set()
        running.node.engine.runner.close()
    assert running.failures == [("r-0", "engine_broken", True)]
    assert running.node.steps.hangs


async def test_a_suspect_of_another_node_is_computed_in_steps_of_its_own() -> None:
    running = Running(max_num_seqs=8, max_num_batched_tokens=16)
    together: list[set[str]] = []
    begins = running.node.role.step_begins

    def note(planned: object) -> None:
        together.append({chunk.sequence.request_id for chunk in planned.chunks})  # type: ignore[attr-defined]
        begins(planned)

    running.node.role.step_begins = note
    for number in range(4):
        params = dataclasses.replace(PARAMS, max_tokens=ALONE_TOKENS)
        entry = a_request(number, prompt(number), params=params, alone=number == 2)
        running.node.role.accept(entry)
    await running.until_idle()
    assert {frozenset(step) for step in together if "r-2/1" in step} == {frozenset({"r-2/1"})}
    assert max(map(len, together)) == 3
    turns = [(own, len(list(steps))) for own, steps in groupby(s == {"r-2/1"} for s in together)]
    assert turns[:4] == [(True, 2), (False, 1), (True, 2), (False, 1)]
    ends = ["r-2/1@16", "r-2/1@28", "", "r-2/1@29", "r-2/1@30", ""]
    assert running.node.alone[:6] == ends, "said before each step"


async def test_a_node_that_has_nothing_to_compute_speaks_against_nobody() -> None:
    """If it is killed then, its record must not name the suspect that it computed last."""
    running = Running()
    params = dataclasses.replace(PARAMS, max_tokens=ALONE_TOKENS)  # alone to its end
    running.node.role.accept(a_request(0, prompt(0), alone=True, params=params))
    steps = asyncio.create_task(running.node.steps.run())
    async with asyncio.timeout(HANGS_S):
        while running.node.role.num_open or running.node.steps.computing:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert [said.partition("@")[0] for said in running.node.alone] == ["r-0/1"] * 4 + [""]
    steps.cancel()


async def test_an_entry_that_the_role_cannot_take_ends_here_and_not_at_the_next_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = Running()
    redis = RedisClient(RedisSettings(url="redis://127.0.0.1:1"))
    entries = Entries(running.node, running.node.role, redis)

    def fail(*_: object, **__: object) -> None:
        raise RecursionError

    with monkeypatch.context() as patched:
        patched.setattr(running.node.engine, "make_sequence", fail)
        entries._accept(a_request(0, prompt(0)))
    entries._accept(a_request(1, prompt(1)))
    await running.until_idle()
    assert running.failures == [("r-0", "poisoned_request", False)]
    assert len(running.tokens("r-1")) == PARAMS.max_tokens
