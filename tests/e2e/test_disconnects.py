"""A client that goes away frees everything on all nodes, whatever was done for it just then."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from common.store.request_record import RequestRecord
from common.store.request_state import State
from common.store.requests import Requests
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies
from tests.support.redis import wait_until

# Far more work than can be done before somebody looks.
ENDLESS = [
    body | {"n": 16, "max_tokens": 400, "ignore_eos": True, "logprobs": 5}
    for body in bodies(12, prompt=(60, 100))
]


@pytest.fixture(scope="module")
def system() -> Iterator[Deployment]:
    with Deployment(STORIES, prefill=1, decode=1) as deployment:
        yield deployment


async def the_records(system: Deployment) -> list[RequestRecord]:
    async with system.redis_client() as client:
        return await Requests(client).recent(len(ENDLESS))


async def any_is(system: Deployment, state: State) -> bool:
    states = {c.state for record in await the_records(system) for c in record.choices}
    return state in states


async def assert_free(system: Deployment) -> None:
    """Before it could have been done: the records name the reason."""
    await system.assert_idle()

    async def closed() -> bool:
        states = {record.state for record in await the_records(system)}
        # on a slow machine one may have come to its end just before its client left
        return State.CANCELLED in states and states <= {State.CANCELLED, State.FINISHED}

    await wait_until(closed, "the records say that they were cancelled")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_while_tokens_are_decoded(system: Deployment, stream: bool) -> None:
    async with Load(system.url, ENDLESS, streams=stream):
        await wait_until(lambda: any_is(system, State.DECODING), "decode has taken over")
    await assert_free(system)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_while_prompts_are_computed(system: Deployment, stream: bool) -> None:
    asked = bodies(40, prompt=(400, 440), max_tokens=(60, 60), seed=31 + stream)
    async with Load(system.url, asked, streams=stream):
        await wait_until(lambda: any_is(system, State.PREFILLING), "a prompt was claimed")
    await assert_free(system)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_while_prompts_are_handed_over(system: Deployment, stream: bool) -> None:
    system.signal("decode-1", signal.SIGSTOP)  # it answers no offer
    try:
        async with Load(system.url, ENDLESS, streams=stream):
            await wait_until(lambda: any_is(system, State.HANDING_OFF), "a prompt is computed")
    finally:
        system.signal("decode-1", signal.SIGCONT)
    await assert_free(system)
