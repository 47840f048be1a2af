"""When a prompt is offered: room that waits for it at a decode node is nobody else's."""

from __future__ import annotations

import math

import pytest

from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk, Step
from common.sampling import SamplingParams
from common.store.queue import Entry
from kv_transfer.ports import Outcome
from prefill_node import role as prefill
from prefill_node.offer_times import ANSWER_S, BYTES_PER_S, OfferTimes
from tests.support.redis import a_dispatch, wait_until
from tests.support.scripted_node import ScriptedNode, ended, key

PER_TOKEN = 12_288  # bytes


def a_step(*chunks: tuple[int, int]) -> Step:
    """Chunks of prompts, by (start, length)."""
    step = Step()
    for number, (start, length) in enumerate(chunks):
        sequence = Sequence(number, f"r-{number}", 0, 4096, [1] * 4096, SamplingParams(max_tokens=2))
        step.append(Chunk(sequence, start, length, 0, is_prompt=True, samples=False))
    return step


def slow(token_s: float, bytes_per_token: int = PER_TOKEN) -> OfferTimes:
    times = OfferTimes(bytes_per_token)
    times.took(a_step((0, 512)), 512 * token_s)
    return times


def test_while_nothing_is_known_the_offer_goes_out_at_once() -> None:
    step = a_step((0, 512))
    assert OfferTimes(PER_TOKEN).until_due(step, step.chunks[0], 4096) == 0


def test_an_offer_goes_out_when_the_transfer_takes_as_long_as_the_rest_of_the_compute() -> None:
    length, token_s = 1024, 0.003
    needs_s = ANSWER_S + length * PER_TOKEN / BYTES_PER_S
    first, last = a_step((0, 512)), a_step((512, 512))
    times = slow(token_s)
    assert times.until_due(first, first.chunks[0], length) == math.inf
    assert times.until_due(last, last.chunks[0], length) == pytest.approx(512 * token_s - needs_s)


def test_a_step_of_several_prompts_takes_longer_for_each() -> None:
    times, alone, beside = slow(0.003), a_step((0, 128)), a_step((0, 128), (0, 384))
    late = times.until_due(beside, beside.chunks[0], 128)
    assert late - times.until_due(alone, alone.chunks[0], 128) == pytest.approx(384 * 0.003)


def test_a_transfer_that_is_slower_than_the_compute_begins_with_the_first_chunk() -> None:
    times, step = slow(0.00006, bytes_per_token=327_680), a_step((0, 512))
    assert times.until_due(step, step.chunks[0], 8192) == 0


def test_newer_steps_count_more() -> None:
    times, step = slow(0.003), a_step((0, 512))
    before = times.until_due(step, step.chunks[0], 512)
    for _ in range(30):
        times.took(step, 512 * 0.001)
    assert times.until_due(step, step.chunks[0], 512) < before / 2


def test_steps_without_a_prompt_say_nothing() -> None:
    times = OfferTimes(PER_TOKEN)
    times.took(Step(), 60.0)
    step = a_step((0, 512))
    assert times.until_due(step, step.chunks[0], 4096) == 0


def a_role(node: ScriptedNode, token_s: float) -> prefill.PrefillRole:
    """It has learned that a prompt token takes so long."""
    role = prefill.PrefillRole(node)
    node.run_role(role)
    role._offer_times.took(a_step((0, 512)), 512 * token_s)
    node.decode_nodes("d1")
    role.accept(Entry("1-0", a_dispatch(prompt=20)))
    return role


async def test_a_prompt_is_offered_in_the_middle_of_the_step_when_its_time_has_come(
    node: ScriptedNode,
) -> None:
    role = a_role(node, (ANSWER_S + 0.05) / 20)
    step = await node.begin_step(role)
    assert node.links.offers == []
    await wait_until(lambda: bool(node.links.offers), "it is offered")
    node.end_step(role, step)
    assert node.links.committed == [key("d1")]
    node.links.tell(ended("d1", Outcome.ADOPTED))


async def test_a_prompt_that_is_computed_sooner_than_expected_is_offered_then(node: ScriptedNode) -> None:
    role = a_role(node, 1000.0)
    await node.step(role)
    assert len(node.links.offers) == 1
    assert node.links.committed == [key("d1")]
    node.links.tell(ended("d1", Outcome.ADOPTED))
    assert role.num_open == 0


async def test_of_a_prompt_that_was_cancelled_nothing_is_offered_when_its_time_comes(
    node: ScriptedNode,
) -> None:
    role = a_role(node, 1.0)
    step = await node.begin_step(role)
    (departure,) = role._departures.values()
    role.cancel("gateway-1", "r-1", 1, "its own")
    node.end_step(role, step)
    role._offer_is_due(departure)
    await node.opened()
    assert node.links.offers == []
