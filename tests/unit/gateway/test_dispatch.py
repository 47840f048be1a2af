"""Accepted requests end with the right tokens or a typed error, whatever happens to the nodes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import (
    ContextLengthExceeded,
    NeverFits,
    Overloaded,
    PdqError,
    PoisonedRequest,
    RequestAborted,
    ServiceUnavailable,
)
from common.metrics import Metrics
from common.sampling import SamplingParams
from common.wire.bus_links import Down
from common.wire.messages import Cancel, Failed, Stage, TokenRun, Tokens, TokensAck, TookOver
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.open_request import OpenRequest, Work
from gateway.placement import DispatchLimits
from gateway.ports import DECODE, PREFILL, UNIFIED, Ending
from gateway.prefix_index import PrefixIndex
from gateway.router import LeastLoadedRouter
from tests.support.asked import a_request
from tests.support.fake_cluster import MODEL, FakeCluster, endless, pair, until

PROMPT = tuple(range(100, 120))
TOKENS = 12
WORK = Work(a_request(PROMPT, SamplingParams(max_tokens=TOKENS, seed=7), "r1", model=MODEL))


def another(name: str) -> Work:
    return dataclasses.replace(WORK, request=dataclasses.replace(WORK.request, id=name))


OVERLOADED = Failed("", "", 0, 0, "overloaded", "full", True)


def connect(cluster: FakeCluster, **limits: object) -> Dispatcher:
    dispatcher = Dispatcher(
        gateway="g1",
        store=cluster,
        bus=cluster,
        directory=cluster,
        router=LeastLoadedRouter(PrefixIndex()),
        limits=DispatchLimits(**limits),  # type: ignore[arg-type]
        metrics=GatewayMetrics(Metrics()),
    )
    cluster.inbox = dispatcher
    return dispatcher


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    """Whatever a test does: afterwards nothing may be left."""
    made = FakeCluster()
    yield made
    made.release()
    await until(lambda: made.running == 0, "nodes idle")
    dispatcher = made.inbox
    assert isinstance(dispatcher, Dispatcher)
    await dispatcher.shut_down()
    made.assert_idle()
    assert dispatcher.num_open == 0


async def collect(request: OpenRequest) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in request.choices]
    async for update in request.updates():
        tokens[update.choice] += [token.token_id for token in update.tokens]
    return tokens


async def run(dispatcher: Dispatcher, work: Work = WORK) -> list[list[int]]:
    async with dispatcher.run(work) as request:
        return await collect(request)


def expected(work: Work = WORK) -> list[list[int]]:
    count = work.request.params.max_tokens
    return [endless(work.request, choice)[:count] for choice in range(work.n)]


async def test_tokens_go_from_node_to_client_and_are_acknowledged(cluster: FakeCluster) -> None:
    pair(cluster)
    assert await run(connect(cluster)) == expected()
    assert cluster.acks[-1] == ("d1", ("r1", 1, 0, len(PROMPT) + TOKENS))
    ((node, dispatch),) = cluster.dispatched
    assert (node, dispatch.attempt, dispatch.decode_node) == ("p1", 1, "d1")
    assert dispatch.request.token_ids == PROMPT
    assert dispatch.request.gateway_endpoint == cluster.endpoint
    await until(lambda: "r1" in cluster.finished)
    (ending,) = cluster.finished["r1"]
    assert (ending.attempt, ending.finish_reason, ending.generated) == (1, "length", TOKENS)
    assert [stage.state for stage in cluster.stages] == ["prefilling", "decoding"]
    assert cluster.cancelled == []


async def test_choices_differ_and_come_from_one_dispatch(cluster: FakeCluster) -> None:
    pair(cluster)
    work = dataclasses.replace(WORK, n=3)
    got = await run(connect(cluster), work)
    assert got == expected(work)
    assert len({tuple(tokens) for tokens in got}) == 3
    assert len(cluster.dispatched) == 1


@pytest.mark.parametrize("victim", ["p1", "d1"])
@pytest.mark.parametrize("after", [0, 1, 5, TOKENS - 1])
async def test_a_node_that_dies_changes_no_token(cluster: FakeCluster, victim: str, after: int) -> None:
    pair(cluster)
    for node in cluster.members.values():
        node.hold_at = after
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        stream = request.choices[0].stream
        await until(lambda: cluster.dispatched and stream.below == len(PROMPT) + after)
        cluster.add("p2", PREFILL)
        cluster.add("d2", DECODE)
        cluster.kill(victim)
        cluster.release()
        assert await collect(request) == expected()
    holder = "p1" if after == 0 else "d1"
    attempts = [dispatch.attempt for _, dispatch in cluster.dispatched]
    if victim != holder:
        assert attempts == [1], "who does not hold the choice may die without a retry"
        return
    assert attempts == [1, 2]
    retry = cluster.dispatched[1][1]
    assert retry.request.token_ids == PROMPT + tuple(expected()[0][:after])
    assert (retry.request.prompt_len, retry.choices, retry.request.params) == (
        len(PROMPT),
        (0,),
        WORK.request.params,
    )


async def test_each_lost_choice_is_retried_by_itself_from_its_own_border(cluster: FakeCluster) -> None:
    node = cluster.add("u1")
    node.hold_at = 4
    dispatcher = connect(cluster)
    work = dataclasses.replace(WORK, n=3)
    async with dispatcher.run(work) as request:
        await until(lambda: all(c.stream.below == len(PROMPT) + 4 for c in request.choices))
        cluster.add("u2")
        cluster.kill("u1")
        assert await collect(request) == expected(work)
    retries = [dispatch for _, dispatch in cluster.dispatched[1:]]
    assert sorted((d.choices, d.attempt) for d in retries) == [((0,), 2), ((1,), 3), ((2,), 4)]


async def test_a_retryable_failure_goes_to_another_node(cluster: FakeCluster) -> None:
    cluster.add("bad").refusal = OVERLOADED
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: cluster.dispatched)
        cluster.add("good")
        assert await collect(request) == expected()
    assert cluster.dispatched[-1][0] == "good"


async def test_a_request_whose_retry_fails_in_a_way_that_nobody_thought_of_ends(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 2)
        cluster.store_error = RuntimeError("a bug")
        cluster.add("u2")
        cluster.kill("u1")
        with pytest.raises(PdqError) as failed:
            await collect(request)
        cluster.store_error = None
    assert failed.value.code == "internal_error"


async def test_an_end_that_cannot_be_written_holds_up_no_other(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add("u1")
    dispatcher, finish = connect(cluster), cluster.finish

    async def fail_for_one(request: str, endings: Sequence[Ending]) -> None:
        if request == "r1":
            raise RuntimeError("a bug")
        await finish(request, endings)

    monkeypatch.setattr(cluster, "finish", fail_for_one)
    await asyncio.gather(run(dispatcher), run(dispatcher, another("r2")))
    await until(lambda: "r2" in cluster.finished)


async def test_tokens_that_waited_for_the_first_are_acknowledged_when_it_comes(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 1
    dispatcher = connect(cluster)
    running = asyncio.create_task(run(dispatcher))
    await until(lambda: cluster.acks)
    first = cluster.dispatched[0][1].request.prompt_len + 1

    def tokens(node: str, position: int) -> None:
        run_of = TokenRun("r1", 1, 0, position, (7,), (), "")
        dispatcher.on_message(node, Tokens(node, (run_of,)))

    cluster.add("decode")
    dispatcher.on_message("u1", TookOver("decode", "r1", 1, 0, first + 1))
    tokens("decode", first + 1)
    assert ("decode", ("r1", 1, 0, first)) in cluster.acks
    tokens("u1", first)
    assert ("decode", ("r1", 1, 0, first + 2)) in cluster.acks
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await until(lambda: cluster.ended)


async def test_attempts_are_bounded(cluster: FakeCluster) -> None:
    cluster.add("bad").refusal = dataclasses.replace(OVERLOADED, code="engine_broken")
    with pytest.raises(ServiceUnavailable, match="after 3 attempts, the last: engine_broken"):
        await run(connect(cluster, max_attempts=3))
    assert [dispatch.attempt for _, dispatch in cluster.dispatched] == [1, 2, 3]


async def test_a_request_that_finds_no_room_waits_for_it(cluster: FakeCluster) -> None:
    full = cluster.add("full")
    full.refusal = OVERLOADED
    running = asyncio.create_task(run(connect(cluster, max_attempts=2)))
    await until(lambda: len(cluster.dispatched) > 3)  # refusals cost no try
    assert not running.done()
    full.refusal = None
    assert await running == expected()


async def test_what_would_fail_anywhere_is_not_retried(cluster: FakeCluster) -> None:
    cluster.add("u1").refusal = dataclasses.replace(
        OVERLOADED, code="never_fits", message="too long", retryable=False
    )
    with pytest.raises(NeverFits, match="too long"):
        await run(connect(cluster))
    assert len(cluster.dispatched) == 1
    await until(lambda: cluster.ended)
    assert cluster.ended["r1"] == ("failed", "never_fits", "too long")


async def test_what_fails_an_engine_alone_is_a_dead_letter_and_is_not_retried(cluster: FakeCluster) -> None:
    cluster.add("u1").refusal = dataclasses.replace(
        OVERLOADED, code="poisoned_request", message="a kernel failed", retryable=False
    )
    with pytest.raises(PoisonedRequest, match="a kernel failed"):
        await run(connect(cluster))
    ((_, dispatch),) = cluster.dispatched
    await until(lambda: cluster.ended and cluster.buried)
    assert cluster.buried == [(dispatch, "u1: a kernel failed")]
    assert cluster.ended["r1"] == ("failed", "poisoned_request", "a kernel failed")


async def test_what_a_node_had_begun_when_it_crashed_is_computed_alone_afterwards(
    cluster: FakeCluster,
) -> None:
    for name in ("u1", "u2"):
        cluster.add(name).hold_at = 2
    running = asyncio.create_task(run(connect(cluster)))
    await until(lambda: cluster.acks)
    (node, dispatch), *_ = cluster.dispatched
    assert not dispatch.alone
    cluster.kill(node, Down.DISCONNECTED)
    cluster.release()
    assert await running == expected()
    assert cluster.dispatched[-1][1].alone


@pytest.mark.parametrize("reason", [Down.GOODBYE, Down.FULL])
async def test_a_node_that_does_not_crash_speaks_against_nobody(cluster: FakeCluster, reason: Down) -> None:
    for name in ("u1", "u2"):
        cluster.add(name).hold_at = 2
    running = asyncio.create_task(run(connect(cluster)))
    await until(lambda: cluster.acks)
    cluster.kill(cluster.dispatched[0][0], reason)
    cluster.release()
    assert await running == expected()
    assert not cluster.dispatched[-1][1].alone


async def test_a_request_that_takes_a_second_node_with_it_alone_is_a_dead_letter(
    cluster: FakeCluster,
) -> None:
    """And what else that node had goes on elsewhere."""
    for name in ("u1", "u2"):
        cluster.add(name).hold_at = 2
    dispatcher = connect(cluster)
    poison = asyncio.create_task(run(dispatcher))
    await until(lambda: cluster.acks)
    cluster.kill(cluster.dispatched[0][0], Down.DISCONNECTED)
    await until(lambda: len(cluster.dispatched) == 2)
    other = asyncio.create_task(run(dispatcher, another("other")))
    await until(lambda: len({ack[0] for _, ack in cluster.acks}) == 2)
    second, dispatch = cluster.dispatched[1]
    cluster.alone_at[second] = f"r1/{dispatch.attempt}@{len(dispatch.request.token_ids)}"
    cluster.add("u3")
    cluster.kill(second, Down.DISCONNECTED)
    with pytest.raises(PoisonedRequest):
        await poison
    assert await other == expected()
    assert [letter.request.id for letter, _ in cluster.buried] == ["r1"]
    assert not cluster.dispatched[-1][1].alone, "it was not in the step"


@pytest.mark.parametrize("alone", ["", "somebody/1@22", "r1/2@21", None])
async def test_a_suspect_that_was_not_alone_in_the_step_is_tried_again(
    cluster: FakeCluster, alone: str | None
) -> None:
    for name in ("u1", "u2"):
        cluster.add(name).hold_at = 2
    running = asyncio.create_task(run(connect(cluster)))
    await until(lambda: cluster.acks)
    cluster.kill(cluster.dispatched[0][0], Down.DISCONNECTED)
    await until(lambda: len(cluster.dispatched) == 2)
    if alone is not None:
        cluster.alone_at[cluster.dispatched[1][0]] = alone
    cluster.add("u3")
    cluster.kill(cluster.dispatched[1][0], Down.DISCONNECTED)
    cluster.release()
    assert await running == expected()
    assert cluster.buried == []


@pytest.mark.parametrize("roles", ["unified", "pair"])
async def test_nodes_that_are_killed_one_after_the_other_do_not_make_their_request_a_poison(
    cluster: FakeCluster, roles: str
) -> None:
    """As a person or the kernel may, each time while it is computed alone, after a token or more."""
    dispatcher = connect(cluster, max_attempts=10)
    if roles == "pair":
        cluster.add("p", PREFILL)
    role = UNIFIED if roles == "unified" else DECODE
    cluster.add("n0", role).hold_at = 3
    running = asyncio.create_task(run(dispatcher))
    for number, below in enumerate((3, 6, 9)):
        victim = f"n{number}"
        reached = (victim, len(PROMPT) + below)
        await until(lambda reached=reached: reached in [(n, ack[3]) for n, ack in cluster.acks])
        cluster.alone_at[victim] = f"r1/{number + 1}@99"
        cluster.add(f"n{number + 1}", role).hold_at = below + 3 if number < 2 else None
        cluster.kill(victim, Down.DISCONNECTED)
    assert await running == expected()
    assert cluster.dispatched[-1][1].alone
    assert cluster.buried == []


async def test_what_was_in_a_step_that_broke_an_engine_is_computed_alone(cluster: FakeCluster) -> None:
    broken = cluster.add("u1")
    broken.refusal = dataclasses.replace(OVERLOADED, code="engine_broken")
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        cluster.add("u2")
        assert await collect(request) == expected()
    assert [dispatch.alone for _, dispatch in cluster.dispatched] == [False, True]


async def test_a_node_that_comes_in_time_takes_the_request(cluster: FakeCluster) -> None:
    dispatcher = connect(cluster)
    running = asyncio.create_task(run(dispatcher))
    await until(lambda: dispatcher.num_open == 1)
    cluster.add("late")
    assert await running == expected()


async def test_without_any_node_the_request_fails_in_time_and_says_why(cluster: FakeCluster) -> None:
    cluster.add("p1", PREFILL)
    with pytest.raises(
        ServiceUnavailable, match=r"no node could take .* 1 prefill; no decode node of 'stories' is here"
    ):
        await run(connect(cluster, placement_timeout_s=0.05))
    assert cluster.dispatched == []


async def test_a_retry_without_a_node_fails_in_time(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster, placement_timeout_s=0.05)
    running = asyncio.create_task(run(dispatcher))
    await until(lambda: cluster.acks)
    cluster.kill("u1")
    with pytest.raises(ServiceUnavailable, match="no node is registered"):
        await running


async def test_leaving_early_cancels_everywhere(cluster: FakeCluster) -> None:
    pair(cluster)
    cluster.members["d1"].hold_at = 3
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 3)
    assert {node for node, _ in cluster.cancelled} == {"p1", "d1"}
    await until(lambda: cluster.running == 0)
    await until(lambda: cluster.ended)
    assert cluster.ended["r1"][0] == "cancelled"


async def test_a_cancelled_task_cancels_everywhere(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 3
    dispatcher = connect(cluster)
    running = asyncio.create_task(run(dispatcher))
    await until(lambda: cluster.acks)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [node for node, _ in cluster.cancelled] == ["u1"]
    assert dispatcher.num_open == 0


async def test_a_choice_that_is_stopped_ends_at_its_nodes_while_its_siblings_go_on(
    cluster: FakeCluster,
) -> None:
    pair(cluster)
    cluster.members["d1"].hold_at = 3
    dispatcher = connect(cluster)
    async with dispatcher.run(dataclasses.replace(WORK, n=2)) as request:
        await until(lambda: all(c.stream.below == len(PROMPT) + 3 for c in request.choices))
        dispatcher.stop(request, 0)
        cancel = Cancel("g1", "r1", 1, "stopped", (0,))
        assert sorted(node for node, _ in cluster.cancelled) == ["d1", "p1"]
        assert {message for _, message in cluster.cancelled} == {cancel}
        await until(lambda: cluster.running == 1, "the other one runs")
        cluster.release()
        tokens = await collect(request)
    assert tokens[1] == expected(dataclasses.replace(WORK, n=2))[1]
    await until(lambda: cluster.finished)
    assert {ending.finish_reason for ending in cluster.finished["r1"]} == {"stop", "length"}


async def test_a_node_that_goes_on_with_a_stopped_choice_is_told_again(cluster: FakeCluster) -> None:
    """The first word was lost, or the choice was on its way to another node."""
    cluster.add("u1").hold_at = 3
    dispatcher = connect(cluster)
    async with dispatcher.run(dataclasses.replace(WORK, n=2)) as request:
        await until(lambda: all(c.stream.below == len(PROMPT) + 3 for c in request.choices))
        dispatcher.stop(request, 0)
        cluster.cancelled.clear()
        cancel = Cancel("g1", "r1", 1, "stopped", (0,))
        run = TokenRun("r1", 1, 0, len(PROMPT) + 3, (1,), (), "")
        cluster.deliver("u1", Tokens("u1", (run,)))
        cluster.add("u2")
        cluster.deliver("u2", TookOver("u2", "r1", 1, 0, len(PROMPT) + 4))
        assert cluster.cancelled == [("u1", cancel), ("u2", cancel)]


async def test_a_stopped_choice_is_finished_and_its_node_told(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 3
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        async for update in request.updates():
            request.stop(update.choice)
    await until(lambda: cluster.finished)
    assert cluster.finished["r1"][0].finish_reason == "stop"
    assert [message.request for _, message in cluster.cancelled] == ["r1"]


async def test_the_limit_of_open_requests_is_overload(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 0
    dispatcher = connect(cluster, max_open=1)
    async with dispatcher.run(WORK):
        with pytest.raises(Overloaded):
            await run(dispatcher, another("r2"))
    assert [dispatch.request.id for _, dispatch in cluster.dispatched] == ["r1"]


async def test_a_request_that_takes_too_long_is_aborted(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 1
    with pytest.raises(RequestAborted):
        await run(connect(cluster, request_timeout_s=0.1))


async def test_nothing_is_dispatched_when_redis_refuses(cluster: FakeCluster) -> None:
    cluster.add("u1")
    cluster.store_error = ServiceUnavailable("Redis is away")
    with pytest.raises(ServiceUnavailable, match="Redis is away"):
        await run(connect(cluster))
    cluster.store_error = None


async def test_a_retry_outlasts_an_outage_of_redis(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 2)
        cluster.add("u2")
        cluster.store_error = ServiceUnavailable("Redis is away")
        cluster.kill("u1")
        await until(lambda: request.choices[0].holder == "u2")
        cluster.store_error = None
        assert await collect(request) == expected()


async def test_requests_are_asserted_again_after_redis_forgot(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 2)
        await dispatcher.reassert()
    assert cluster.asserted == [("r1", 1, "u1")]


async def test_tokens_of_a_closed_request_are_acknowledged_and_stopped(cluster: FakeCluster) -> None:
    dispatcher = connect(cluster)
    sent: list[object] = []
    cluster.send = lambda node, message: sent.append((node, message))  # type: ignore[method-assign]
    run_ = TokenRun("gone", 2, 0, 50, (7, 8), (), "")
    dispatcher.on_message("d9", Tokens("d9", (run_,)))
    dispatcher.on_message("d9", TookOver("d9", "gone", 2, 0, 50))
    cancel = Cancel("g1", "gone", 2, "closed")
    assert sent == [("d9", cancel), ("d9", TokensAck("g1", (("gone", 2, 0, 52),))), ("d9", cancel)]


async def test_an_old_attempt_that_lives_on_is_dropped_and_stopped(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        stream = request.choices[0].stream
        await until(lambda: stream.below == len(PROMPT) + 2)
        cluster.add("u2").hold_at = 2
        zombie = cluster.members["u1"]
        dispatcher.on_node_lost("u1", "taken for dead")
        await until(lambda: len(cluster.dispatched) == 2)
        assert cluster.members["u1"] is zombie
        late = TokenRun("r1", 1, 0, len(PROMPT) + 2, (expected()[0][2],), (), "")
        dispatcher.on_message("u1", Tokens("u1", (late,)))
        assert stream.below == len(PROMPT) + 2, "only the new attempt goes on"
        assert ("u1", Cancel("g1", "r1", 1, "superseded")) in cluster.cancelled
        cluster.release()
        assert await collect(request) == expected()


@pytest.mark.parametrize("kind", ["TookOver", "Stage"])
async def test_what_a_dead_node_said_before_it_died_does_not_hold_a_choice(
    cluster: FakeCluster, kind: str
) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 2)
        cluster.add("u2")
        late: Stage | TookOver = TookOver("gone", "r1", 1, 0, len(PROMPT) + 2)
        if kind == "Stage":
            late = Stage("gone", "r1", 1, 0, "prefilling", {}, 0)
            request.choices[0].heard = False  # as if its entry had moved there, unread
        # That it took over, the one before it says as well; of its own word nothing follows.
        dispatcher.on_message("u1" if kind == "TookOver" else "gone", late)
        cluster.release()
        assert await collect(request) == expected()
    assert len(cluster.dispatched) == (2 if kind == "TookOver" else 1)


async def test_a_node_that_dies_while_the_request_is_queued_is_no_end(cluster: FakeCluster) -> None:
    cluster.add("u1")
    dispatcher = connect(cluster)
    running = asyncio.create_task(run(dispatcher))
    await until(lambda: cluster.accepting)
    cluster.kill("u1")
    cluster.add("u2")
    assert await running == expected()


async def test_what_can_never_fit_is_refused_before_it_is_queued(cluster: FakeCluster) -> None:
    cluster.add("u1", max_model_len=16)
    with pytest.raises(ContextLengthExceeded):
        await run(connect(cluster))
    assert cluster.dispatched == []


async def test_malformed_runs_are_counted_and_harm_nobody(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 1
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 1)
        for bad in (
            TokenRun("r1", 1, 5, len(PROMPT), (1,), (), ""),
            TokenRun("r1", 1, -1, len(PROMPT), (1,), (), ""),
            TokenRun("r1", 9, 0, len(PROMPT) + 1, (1,), (), ""),
            TokenRun("r1", 1, 0, 2**40, (1,), (), ""),
            TokenRun("r1", 1, 0, len(PROMPT) + 1, (), (), "error"),
        ):
            dispatcher.on_message("u1", Tokens("u1", (bad,)))
        cluster.release()
        assert await collect(request) == expected()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_deaths_ends_in_the_right_tokens_or_a_typed_error(data: st.DataObject) -> None:
    """Nodes die and come at random moments; what the client got is always a prefix of the truth."""

    async def scenario() -> None:
        cluster = FakeCluster()
        cluster.batch = data.draw(st.integers(1, 4))
        pair(cluster)
        cluster.add("u1")
        dispatcher = connect(cluster, max_attempts=3, placement_timeout_s=0.05)
        work = dataclasses.replace(WORK, n=data.draw(st.integers(1, 3)))
        got: list[list[int]] = [[] for _ in range(work.n)]
        serial = 0
        try:
            async with dispatcher.run(work) as request:
                async for update in request.updates():
                    got[update.choice] += [token.token_id for token in update.tokens]
                    if cluster.members and data.draw(st.integers(0, 5)) == 0:
                        cluster.kill(data.draw(st.sampled_from(sorted(cluster.members))))
                    if data.draw(st.integers(0, 3)) == 0:
                        serial += 1
                        role = data.draw(st.sampled_from(["unified", PREFILL, DECODE]))
                        cluster.add(f"n{serial}", role)
            assert got == expected(work)
        except PdqError as error:
            assert isinstance(error, ServiceUnavailable)  # noqa: PT017
        for tokens, truth in zip(got, expected(work), strict=True):
            assert tokens == truth[: len(tokens)]
        await dispatcher.shut_down()
        await until(lambda: cluster.running == 0)
        cluster.assert_idle()
        assert dispatcher.num_open == 0

    asyncio.run(scenario())


async def test_a_late_stage_does_not_take_a_choice_from_the_node_that_took_over(cluster: FakeCluster) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].stream.below == len(PROMPT) + 2)
        holder = request.choices[0].holder
        cluster.add("u2")
        dispatcher.on_message("u2", Stage("u2", "r1", 1, 0, "prefilling", {}, 0))
        assert request.choices[0].holder == holder
        cluster.release()
        assert await collect(request) == expected()


async def test_tokens_alone_say_who_holds_a_choice(cluster: FakeCluster) -> None:
    """The messages that say it may be lost with a link; tokens are sent again."""
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        choice = request.choices[0]
        await until(lambda: choice.stream.below == len(PROMPT) + 2)
        cluster.add("u2")
        choice.heard = False
        run = TokenRun("r1", 1, 0, len(PROMPT) + 2, (expected()[0][2],), (), "")
        dispatcher.on_message("u2", Tokens("u2", (run,)))
        assert (choice.holder, choice.heard) == ("u2", True)
        rest = TokenRun("r1", 1, 0, len(PROMPT) + 3, tuple(expected()[0][3:]), (), "length")
        dispatcher.on_message("u2", Tokens("u2", (rest,)))
        assert await collect(request) == expected()


async def test_a_takeover_that_was_overtaken_by_the_next_one_changes_nothing(cluster: FakeCluster) -> None:
    """Both ends of each move say who took over: what the first sender says may come last."""
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        choice = request.choices[0]
        await until(lambda: choice.stream.below == len(PROMPT) + 2)
        cluster.add("d1")
        cluster.add("d2")
        first, second = len(PROMPT) + 2, len(PROMPT) + 5
        for node, position in (("d1", first), ("d2", second), ("d1", first)):
            dispatcher.on_message("u1", TookOver(node, "r1", 1, 0, position))
        assert (choice.holder, choice.held_from) == ("d2", second)
        assert choice.owing == {"u1": first, "d1": second}
        ids = tuple(expected()[0][2:5])
        dispatcher.on_message("d1", Tokens("d1", (TokenRun("r1", 1, 0, first, ids, (), ""),)))
        cluster.kill("d1")
        assert choice.holder == "d2"
        cluster.release()
        assert await collect(request) == expected()
    assert [dispatch.attempt for _, dispatch in cluster.dispatched] == [1]


@pytest.mark.parametrize("arrived", [False, True])
async def test_who_handed_on_and_dies_is_missed_only_for_the_tokens_before(
    cluster: FakeCluster, arrived: bool
) -> None:
    cluster.add("u1").hold_at = 2
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        choice, ids = request.choices[0], expected()[0]
        await until(lambda: choice.stream.below == len(PROMPT) + 2)
        cluster.add("d1").hold_at = 0

        def tokens(node: str, index: int) -> None:
            run = TokenRun("r1", 1, 0, len(PROMPT) + index, (ids[index],), (), "")
            dispatcher.on_message(node, Tokens(node, (run,)))

        dispatcher.on_message("u1", TookOver("d1", "r1", 1, 0, len(PROMPT) + 3))
        tokens("d1", 3)
        if arrived:
            tokens("u1", 2)
        cluster.kill("u1")
        retried = request.attempt == 2
        assert retried is not arrived, "a gap that nobody can fill is computed again"
        acknowledged = ("d1", ("r1", 1, 0, len(PROMPT) + 4)) in cluster.acks
        assert acknowledged, "what waited behind the gap is kept at its node no longer"
        cluster.release()
        if arrived:
            for index in range(4, TOKENS):
                end = "length" if index == TOKENS - 1 else ""
                run = TokenRun("r1", 1, 0, len(PROMPT) + index, (ids[index],), (), end)
                dispatcher.on_message("d1", Tokens("d1", (run,)))
        assert await collect(request) == expected()
