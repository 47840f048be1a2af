"""Nodes that differ in what must be equal: no KV goes between them, and one line says what differs.

A prefill node, and decode nodes of which one has its KV in another dtype.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

from common.engine import SamplingParams
from common.identity import ModelIdentity
from common.store.registry import NodeRecord, NodeState
from tests.support.checkpoints import BABYLLAMA, STORIES
from tests.support.deployment import Deployment
from tests.support.dispatching import dispatch
from tests.support.engines import poisoned_engine

LIMIT_S = 120.0


@pytest.fixture(scope="module")
def system() -> Iterator[Deployment]:
    deployment = Deployment(STORIES)
    deployment.redis.start()
    try:
        deployment.start_gateway("gateway")
        deployment.start_node("prefill", "prefill")
        deployment.flags = ("--dtype", "bfloat16")
        deployment.start_node("other", "decode")
        deployment.flags = ()
        yield deployment
    finally:
        deployment.stop()


async def ready(system: Deployment) -> dict[str, NodeRecord]:
    """The records of all that were started, once each says that it is ready."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        records = await system.records()
        if records.keys() == system.processes.keys() and all(
            record.state is NodeState.READY for record in records.values()
        ):
            return records
        assert time.monotonic() < deadline, (list(records), system.logs())
        await asyncio.sleep(0.1)


async def test_the_gateway_names_the_field_both_values_and_the_nodes(system: Deployment) -> None:
    records = await ready(system)
    deadline, reason = time.monotonic() + LIMIT_S, ""
    async with httpx.AsyncClient(base_url=records["gateway"].url) as client:
        while "go together" not in reason:
            assert time.monotonic() < deadline, (reason, system.logs())
            reply = await client.get("/ready")
            assert reply.status_code == 503
            reason = reply.json()["reason"]
            await asyncio.sleep(0.1)
    prefill, decode = records["prefill"], records["other"]
    assert reason == (
        f"no prefill and decode nodes that go together: dtype is 'float32' at "
        f"{prefill.incarnation} and 'bfloat16' at {decode.incarnation}; start them with the "
        "same model, version and settings"
    )
    async with httpx.AsyncClient(base_url=records["gateway"].url, timeout=60.0) as client:
        body = {"model": STORIES.name, "prompt": [1, 5, 7], "max_tokens": 4}
        reply = await client.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "service_unavailable")
    assert reply.json()["error"]["message"].endswith(reason)


async def test_a_prompt_for_a_node_that_refuses_the_link_goes_to_one_that_matches(system: Deployment) -> None:
    """Somebody chose the wrong decode node, as a gateway with an old picture could: the node refuses
    the link, naming the field, and the prefill node goes to the other one."""
    system.start_node("matching", "decode")
    records = await ready(system)
    prompt = tuple(range(3, 60))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    (truth,) = poisoned_engine().generate([prompt], params)
    async with system.redis_client() as redis:
        answer = await dispatch(redis, "stale", prompt, params, records["prefill"], records["other"])
    assert answer.failed is None, (answer.failed, system.logs())
    assert answer.token_ids == truth.token_ids
    assert answer.took_over == {records["matching"].incarnation}
    refused = [line for line in system.logs().splitlines() if "link.refused" in line]
    assert refused, "it was asked; more than once, if the other one was not known yet"
    assert all("dtype is 'bfloat16' there and 'float32' here" in line for line in refused)


async def test_a_request_for_another_model_is_given_back_and_not_computed(system: Deployment) -> None:
    """Somebody put it into the wrong queue: the node says so at once, and whoever asked can go on."""
    system.model = BABYLLAMA
    system.start_node("stranger", "unified")
    system.model = STORIES
    records = await ready(system)
    stories, stranger = records["prefill"], records["stranger"]
    asked = ModelIdentity(stories.model, stories.revision, stories.tokenizer)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    async with system.redis_client() as redis:
        answer = await dispatch(redis, "strange", (1, 5, 7), params, stranger, model=asked)
    assert answer.failed is not None
    assert (answer.failed.code, answer.failed.retryable) == ("fingerprint_mismatch", True)
    assert not answer.tokens
    assert (await system.records())["stranger"].steps == stranger.steps
