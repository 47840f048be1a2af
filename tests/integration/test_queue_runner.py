"""An engine on an accelerator that computes as late, or in as odd an order, as it may.

It gives the tokens of one that waits for each operation, whatever fails. That these tests would see what they
are for is shown at the end: each line of host logic that keeps an order is taken out, and they fail.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from common.engine import Engine, SamplingParams
from common.engine.core.output import StepOutput
from common.engine.core.step import Step
from common.engine.interface import StepInput
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.queue_runner import QueueRunner
from common.engine.runner.rest_of_step import RestOfStep
from common.engine.runner.step_memory import AT_ONCE, StepMemories, StepMemory
from common.engine.runner.step_program import StepProgram
from common.engine.runner.step_waiter import StepWaiter
from common.engine.runner.thread_runner import ThreadRunner
from common.errors import EngineBroken
from common.identity import ModelIdentity
from common.request import Request
from common.settings.config import EngineSettings
from tests.support.checkpoints import DRAFT, STORIES
from tests.support.engines import FreeRounds, NoCosts
from tests.support.fake_accelerator import FakeAccelerator, FakeEvent, Fault, Order
from tests.support.fake_device import FakeDevice
from tests.support.redis import HANGS_S

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
FIELDS: dict[str, Any] = {
    "model": str(STORIES),
    "dtype": "float32",
    "num_kv_blocks": 48,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 128,
    "block_size": 8,
}
ORDERS = [(Order.LATE, 0), (Order.RANDOM, 1)]
PATTERN = 0x5C


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(**settings: Any) -> Engine:
    """The same operations, step by step, without a queue."""
    wanted = EngineSettings(**(FIELDS | settings))
    return Engine(wanted, ModelRunner(wanted, device=FakeDevice(wanted)))


def queue_runner(accelerator: FakeAccelerator, wanted: EngineSettings) -> QueueRunner:
    device = FakeDevice(wanted, accelerator)
    queue = device.queue()
    assert queue is not None
    return QueueRunner(wanted, device, queue)


class OnAccelerator(Engine):
    """Blocks that nobody holds are filled by somebody else, by a queue of his own, as an intake would."""

    runner: QueueRunner

    def __init__(self, accelerator: FakeAccelerator, *, ahead: int = 1, **settings: Any) -> None:
        wanted = EngineSettings(**(FIELDS | settings))
        self.accelerator = accelerator
        super().__init__(wanted, queue_runner(accelerator, wanted), on_free=self._freed)
        self.steps_ahead = ahead
        self.others = accelerator.queue()
        self._freed(range(self.facts.num_blocks))
        self.failures: list[BaseException] = []
        self.num_rows = 0  # that were planned

    def plan(self, *arguments: Any) -> Step | None:
        step = super().plan(*arguments)
        self.num_rows += 0 if step is None else step.num_tokens
        return step

    def _freed(self, block_ids: Sequence[int]) -> None:
        cache, ids = self.runner.cache, list(block_ids)
        self.others.run(lambda: cache.poison(ids))
        self.others.synchronize()

    def to_the_end(self) -> dict[str, tuple[int, ...]]:
        """The tokens by request; what a failure takes is computed again."""
        found: dict[str, tuple[int, ...]] = {}
        while self.has_work:
            try:
                outputs = self.step()
            except RuntimeError as error:
                self.failures.append(error)
                if self.runner.is_lost(error):
                    raise
                continue
            for output in outputs:
                name = f"{output.request_id}-{output.choice}"
                found[name] = found.get(name, ()) + tuple(output.token_ids)
        return found


@contextmanager
def on_accelerator(order: Order = Order.LATE, seed: int = 0, **settings: Any) -> Iterator[OnAccelerator]:
    """Afterwards nothing is held, and it ends in order."""
    engine = OnAccelerator(FakeAccelerator(order, seed), **settings)
    try:
        with engine.accelerator.watching():
            yield engine
            engine.check_idle()
    finally:
        engine.accelerator.release()
        engine.runner.close(HANGS_S)
    assert len(engine.runner._program.memories._free) == AT_ONCE, "a step keeps its pinned memory"


def prompts(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    choice = random.Random(seed)
    lengths = [choice.randint(1, longest) for _ in range(count)]
    return [[choice.randrange(3, 500) for _ in range(length)] for length in lengths]


KINDS = [
    GREEDY,
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.9, seed=5, top_p=0.9, top_k=40),
    SamplingParams(
        max_tokens=11,
        ignore_eos=True,
        temperature=0.7,
        seed=3,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
    ),
    SamplingParams(max_tokens=6, temperature=0.0, logprobs=4, min_tokens=3, logit_bias=((7, 2.0),)),
    SamplingParams(max_tokens=7, temperature=1.0, seed=9, logprobs=0, prompt_logprobs=2),
]


def of_all_kinds(seed: int, count: int) -> list[SamplingParams]:
    choice = random.Random(seed)
    return [choice.choice(KINDS) for _ in range(count)]


def add_all(engine: Engine, asked: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
    for index, (ids, wanted) in enumerate(zip(asked, params, strict=True)):
        engine.add_prompt(f"r{index}", ids, wanted)


# The same tokens.


@pytest.mark.parametrize(("order", "seed"), [*ORDERS, (Order.EARLY, 0), (Order.RANDOM, 2)])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("eager", [False, True])
def test_the_tokens_are_those_of_an_engine_that_waits(
    order: Order, seed: int, ahead: int, eager: bool
) -> None:
    asked, params = prompts(seed, 10), of_all_kinds(seed, 10)
    expected = alone().generate(asked, params)
    with on_accelerator(order, seed, ahead=ahead, enforce_eager=eager) as engine:
        assert engine.generate(asked, params) == expected
        assert ("replay" in engine.accelerator.given) == (not eager)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_preemption_and_what_is_computed_again_leave_no_trace(order: Order, seed: int) -> None:
    asked = [list(range(n, n + 8)) for n in range(20, 60, 10)]
    params = [dataclasses.replace(kind, max_tokens=24) for kind in (*KINDS[:3], GREEDY)]
    expected = alone().generate(asked, params)
    with on_accelerator(order, seed, num_kv_blocks=8) as engine:
        assert engine.generate(asked, params) == expected
        assert engine.scheduler.num_preemptions


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_cached_prefixes_and_copies_on_write_leave_no_trace(order: Order, seed: int) -> None:
    shared = prompts(1, 1)[0][:8] + list(range(50, 74))
    asked = [[*shared, *tail] for tail in prompts(seed + 20, 4, longest=9)] + [shared, shared]
    params = of_all_kinds(seed + 20, len(asked))
    expected = alone(enable_prefix_caching=False).generate(asked, params, n=3)
    with on_accelerator(order, seed) as engine:
        rows = []
        for _ in range(2):
            begun = engine.num_rows
            assert engine.generate(asked, params, n=3) == expected
            rows.append(engine.num_rows - begun)
        assert rows[1] < rows[0]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    "drafts",
    [
        {"speculative": "ngram"},
        {"speculative": "draft", "speculative_model": str(DRAFT)},
        {"speculative": "ngram+draft", "speculative_model": str(DRAFT), "speculative_by_text": True},
    ],
    ids=["ngram", "draft", "by text"],
)
def test_drafts_leave_no_trace(
    order: Order, seed: int, drafts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engine.speculation.drafting.StepCosts", NoCosts)
    monkeypatch.setattr("common.engine.speculation.drafting.RoundCosts", FreeRounds)
    asked, params = prompts(seed + 30, 6), of_all_kinds(seed + 30, 6)
    expected = expected_tokens(asked, params)
    with on_accelerator(order, seed, num_speculative_tokens=3, **drafts) as engine:
        model = ModelIdentity.of(engine.fingerprint)
        for index, (ids, wanted) in enumerate(zip(asked, params, strict=True)):
            right, name = expected[f"r{index}-0"], f"r{index}"
            guess = (*right[:5], 3, *right[6:]) if index % 2 else ()
            engine.add(name, Request(name, model, tuple(ids), len(ids), wanted, prediction=guess))
        assert engine.to_the_end() == expected
        assert engine.proposer is not None
        assert sum(counts.drafted for counts in engine.proposer.counts.values())


def test_the_next_step_is_given_while_one_is_computed() -> None:
    with on_accelerator() as engine:
        add_all(engine, prompts(1, 3), [GREEDY] * 3)
        given: list[int] = []
        original = engine.runner.submit

        def submit(step: StepInput, *further: Any) -> Any:
            given.append(len(engine._submitted))
            return original(step, *further)

        engine.runner.submit = submit  # type: ignore[method-assign]
        engine.to_the_end()
        assert max(given) == 1


# What is said before a token is chosen.


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_blocks_are_handed_over_when_they_hold_their_kv_and_not_before(order: Order, seed: int) -> None:
    check_handing_over(order, seed)


def check_handing_over(order: Order = Order.LATE, seed: int = 0) -> None:
    with on_accelerator(order, seed) as engine:
        add_all(engine, prompts(seed, 4), [GREEDY] * 4)
        cache, seen = engine.runner.cache, list[tuple[frozenset[int], torch.Tensor]]()
        while engine.has_work:
            step = engine.plan()
            assert step is not None
            tables = [chunk.sequence.block_table[: chunk.end // 8] for chunk in step.chunks]
            blocks = sorted({block for table in tables for block in table})

            def content(blocks: list[int] = blocks) -> torch.Tensor:
                """As somebody else would read it now, by a queue of his own."""
                found: list[torch.Tensor] = []
                engine.others.run(lambda: found.append(cache.slabs[blocks].clone()))
                engine.others.synchronize()
                return found[0]

            future = engine.runner.submit(step.input, lambda spoiled: seen.append((spoiled, content())))
            result = future.result(HANGS_S)
            spoiled, then = seen[-1]
            assert spoiled == result.spoiled == frozenset()
            assert torch.equal(then, content())
            assert not torch.isnan(then.view(torch.float32)).any()
            engine.commit(step, result)


def test_what_is_not_finite_spoils_its_sequence_and_no_other() -> None:
    asked = [[9, 4, 5], [7] * 30, [11, 12]]
    expected = alone().generate([asked[0], asked[2]], GREEDY)
    with on_accelerator() as engine:
        embedding = engine.runner.model._embedding
        embedding[7] = float("nan")
        add_all(engine, asked, [GREEDY] * 3)
        outputs: list[StepOutput] = []
        while engine.has_work:
            outputs += engine.step()
        failed = [output for output in outputs if output.error is not None]
        assert [output.request_id for output in failed] == ["r1"]
        for index, name in enumerate(("r0", "r2")):
            tokens = [t for output in outputs if output.request_id == name for t in output.token_ids]
            assert tuple(tokens) == expected[index].token_ids


# What fails.


def expected_tokens(asked: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> dict[str, Any]:
    found = alone().generate(asked, params)
    return {f"r{index}-0": one.token_ids for index, one in enumerate(found)}


@pytest.mark.parametrize("fault", [Fault.AT_ENQUEUE, Fault.AT_EVENT])
@pytest.mark.parametrize(("what", "nths"), [("run", 4), ("copy", 4), ("record", 3), ("replay", 2)])
def test_a_step_that_fails_is_computed_again_and_nothing_else_is_lost(
    what: str, nths: int, fault: Fault
) -> None:
    asked, params = prompts(3, 5, longest=30), of_all_kinds(3, 5)
    expected = expected_tokens(asked, params)
    for nth in range(nths):
        with on_accelerator(Order.LATE, nth) as engine:
            add_all(engine, asked, params)
            engine.accelerator.inject(what, nth, fault)
            assert engine.to_the_end() == expected
            assert engine.failures
            assert not engine.accelerator.injected


@pytest.mark.parametrize("what", ["run", "copy", "record", "replay"])
def test_an_error_on_the_device_ends_it_at_once(what: str) -> None:
    engine = OnAccelerator(FakeAccelerator())
    add_all(engine, prompts(3, 6, longest=30), of_all_kinds(3, 6))
    engine.accelerator.inject(what, 3, Fault.IN_WORK)
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.to_the_end()
    assert len(engine.failures) == 1
    engine.runner.close(HANGS_S)


def test_what_fails_while_it_is_given_takes_nothing_that_was_given_before() -> None:
    asked, params = prompts(3, 6, longest=30), of_all_kinds(3, 6)
    with on_accelerator() as engine:
        add_all(engine, asked, params)
        while not engine._submitted:
            engine.step()
        before = engine.num_steps
        engine.accelerator.inject("copy", 0, Fault.AT_ENQUEUE)
        engine.step()
        assert engine.num_steps == before + 1
        assert engine.to_the_end()


def test_blocks_of_a_step_that_failed_are_nobodys_before_its_queue_has_ended() -> None:
    check_fence()


def check_fence() -> None:
    """Somebody else fills them as soon as they are free; what the step still had in the queue would show."""
    for nth in range(3):
        with on_accelerator(ahead=0) as engine:
            add_all(engine, prompts(5, 3, longest=20), [GREEDY] * 3)
            engine.accelerator.inject("record", nth, Fault.AT_ENQUEUE)
            with suppress(RuntimeError):
                while engine.has_work:
                    engine.step()
            for name in ("r0", "r1", "r2"):
                engine.abort(name)
            slabs = engine.runner.cache.slabs
            engine.others.run(lambda slabs=slabs: slabs.fill_(PATTERN))  # type: ignore[misc]
            engine.others.synchronize()
            engine.runner._queue.synchronize()
            with engine.accelerator.as_device():
                assert bool((slabs == PATTERN).all()), "a step that has failed wrote into blocks of others"
            engine._freed(range(engine.facts.num_blocks))


def test_a_step_that_hangs_does_not_end_and_says_so() -> None:
    engine = OnAccelerator(FakeAccelerator(), ahead=1)
    add_all(engine, prompts(5, 3), [GREEDY] * 3)
    engine.accelerator.inject("run", 1, Fault.HANGS)
    step = engine.plan()
    assert step is not None
    future = engine.runner.submit(step.input)
    with pytest.raises(EngineBroken, match="did not end within"):
        engine.runner.close(0.05)
    assert not future.done()
    engine.accelerator.release()
    engine.runner.close(HANGS_S)
    engine.commit(step, future.result(0))


def test_closing_waits_for_what_was_given() -> None:
    wanted = EngineSettings(**FIELDS)
    accelerator = FakeAccelerator()
    runner = ThreadRunner(lambda: queue_runner(accelerator, wanted))
    engine = Engine(wanted, runner)
    add_all(engine, prompts(5, 3), [GREEDY] * 3)
    first = engine.plan()
    assert first is not None
    futures = [runner.submit(first.input)]
    second = engine.plan()
    if second is not None:
        futures.append(runner.submit(second.input))
    runner.close(HANGS_S)
    assert all(future.done() and future.exception() is None for future in futures)


def test_a_thread_gives_steps_and_waits_for_none() -> None:
    """Else the next step could not be given while one is computed."""
    wanted = EngineSettings(**FIELDS)
    accelerator = FakeAccelerator()
    runner = ThreadRunner(lambda: queue_runner(accelerator, wanted))
    engine = Engine(wanted, runner)
    add_all(engine, [[5, 6, 7]] * 2, [GREEDY] * 2)
    engine.step()
    accelerator.inject("copy", 1, Fault.HANGS)  # the results of the next step
    steps, futures = [], []
    for _ in range(2):
        step = engine.plan()
        assert step is not None
        steps.append(step)
        futures.append(runner.submit(step.input))
    runner._thread.submit(lambda: None).result(HANGS_S)
    assert not any(future.done() for future in futures)
    accelerator.release()
    for step, future in zip(steps, futures, strict=True):
        engine.commit(step, future.result(HANGS_S))
    engine.abort("r0")
    engine.abort("r1")
    runner.close(HANGS_S)


def test_whoever_waits_no_longer_ends_no_step_and_none_after_it() -> None:
    with on_accelerator() as engine:
        add_all(engine, [[5, 6, 7]], [GREEDY])
        for _ in range(2):
            step = engine.plan()
            assert step is not None
            future = engine.runner.submit(step.input)
            assert not future.cancel()
            engine.commit(step, future.result(HANGS_S))
        assert engine.to_the_end()


def test_a_step_without_host_memory_fails_and_the_next_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an earlier one is under way, which may still write."""
    asked, params = prompts(2, 4), of_all_kinds(2, 4)
    expected = expected_tokens(asked, params)
    original, calls = StepMemories.take, itertools.count()

    def take(memories: StepMemories) -> StepMemory:
        if next(calls) == 3:
            raise RuntimeError("no pinned memory is left")
        return original(memories)

    with on_accelerator() as engine:
        monkeypatch.setattr(StepMemories, "take", take)
        add_all(engine, asked, params)
        assert engine.to_the_end() == expected
        assert [str(error) for error in engine.failures] == ["no pinned memory is left"]
        assert next(calls) > 4


# Whether all this would be seen.


def check_tokens(order: Order = Order.LATE, seed: int = 0) -> None:
    asked, params = prompts(3, 8), of_all_kinds(3, 8)
    expected = expected_tokens(asked, params)
    with on_accelerator(order, seed) as engine:
        add_all(engine, asked, params)
        assert engine.to_the_end() == expected
        assert not engine.failures


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeEvent, "wait", lambda event: None)


def with_one_pinned_memory(patch: pytest.MonkeyPatch) -> None:
    def take(memories: StepMemories) -> StepMemory:
        return memories._free[0]

    patch.setattr(StepMemories, "take", take)
    patch.setattr(StepMemories, "give_back", lambda memories, memory: None)


def with_a_pinned_memory_that_is_given_back_at_once(patch: pytest.MonkeyPatch) -> None:
    original = StepProgram.give

    def give(program: StepProgram, step: StepInput, memory: StepMemory, **further: Any) -> Any:
        under_way = original(program, step, memory, **further)
        program.memories.give_back(memory)
        return under_way

    patch.setattr(StepProgram, "give", give)


def without_a_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepWaiter, "_fenced", lambda waiter, error: error)


def with_uploads_by_another_queue(patch: pytest.MonkeyPatch) -> None:
    original = StepProgram._upload

    def upload(program: StepProgram, *arguments: Any) -> Any:
        own, program.queue = program.queue, program.queue.accelerator.queue()  # type: ignore[attr-defined]
        try:
            return original(program, *arguments)
        finally:
            program.queue = own

    patch.setattr(StepProgram, "_upload", upload)


def with_results_by_another_queue(patch: pytest.MonkeyPatch) -> None:
    original = StepProgram._give_generated

    def generated(program: StepProgram, padded: int, *, greedy: bool) -> None:
        own, program.queue = program.queue, program.queue.accelerator.queue()  # type: ignore[attr-defined]
        try:
            original(program, padded, greedy=greedy)
        finally:
            program.queue = own

    patch.setattr(StepProgram, "_give_generated", generated)


def with_tokens_of_prompts_over_those_of_replies(patch: pytest.MonkeyPatch) -> None:
    """The step after reads what the wrong row was given."""
    original = RestOfStep.sample

    def sample(rest: RestOfStep, *, greedy: bool) -> None:
        original(rest, greedy=greedy)
        tokens = rest._program.last_tokens
        tokens[: len(rest._under_way.split.order)] = tokens[rest._under_way.split.order]

    patch.setattr(RestOfStep, "sample", sample)


def with_handing_over_at_once(patch: pytest.MonkeyPatch) -> None:
    original = QueueRunner.submit

    def submit(runner: QueueRunner, step: StepInput, filled: Any = None, /) -> Any:
        if filled is not None:
            filled(frozenset())
        return original(runner, step, filled and (lambda spoiled: None))

    patch.setattr(QueueRunner, "submit", submit)


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (without_waiting, check_tokens),
        (with_one_pinned_memory, check_tokens),
        (with_a_pinned_memory_that_is_given_back_at_once, check_tokens),
        (without_a_fence, check_fence),
        (with_uploads_by_another_queue, check_tokens),
        (with_results_by_another_queue, check_tokens),
        (with_tokens_of_prompts_over_those_of_replies, check_tokens),
        (with_handing_over_at_once, check_handing_over),
    ],
)
def test_it_would_be_seen(
    mutation: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mutation(patch)
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            check()
    check()
