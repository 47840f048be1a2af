"""A fleet whose KV has 8 bits, and a scale for each position and head: it goes from node to node as it is.

Between processes, over shm to a decode node with the prefill node's block size, and over tcp to one that
converts; the tokens are those of the in-process engine. A decode node that keeps its KV as the model
computes gets nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from common.engine import Completion, SamplingParams
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.dispatching import dispatch
from tests.support.engines import poisoned_engine
from tests.support.load import Load, bodies, truth

FP8 = ("--kv-cache-dtype", "fp8")
NODES = {  # flags
    "prefill": FP8,
    "over-shm": (*FP8, "--transports", "shm"),
    "over-tcp": (*FP8, "--transports", "tcp", "--block-size", "24"),
    "other": (),
}
BODIES = bodies(24, max_tokens=(1, 60), prompt=(1, 200), seed=7)


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    return truth(poisoned_engine(max_num_seqs=16, kv_cache_dtype="fp8"), BODIES)


@pytest.fixture(scope="module")
def system() -> Iterator[Deployment]:
    deployment = Deployment(STORIES)
    deployment.redis.start()
    try:
        deployment.start_gateway("gateway")
        for name, flags in NODES.items():
            deployment.flags = flags
            deployment.start_node(name, "prefill" if name == "prefill" else "decode")
        asyncio.run(deployment.wait_ready())
        yield deployment
    finally:
        deployment.stop()


async def test_every_request_gets_the_engines_tokens_over_either_transport(
    system: Deployment, expected: list[list[Completion]]
) -> None:
    for _ in range(2):  # the second time from the prefix cache
        async with Load(system.url, BODIES) as load:
            await load.finish(expected)
    await system.assert_idle()
    records = await system.records()
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(3, 60))  # with a tail in blocks of either size
    (alone,) = poisoned_engine(kv_cache_dtype="fp8").generate([prompt], params)
    async with system.redis_client() as redis:
        for name in ("over-shm", "over-tcp"):
            answer = await dispatch(redis, name, prompt, params, records["prefill"], records[name])
            assert answer.failed is None, (answer.failed, system.logs())
            assert answer.token_ids == alone.token_ids
            assert answer.took_over == {records[name].incarnation}
    await system.assert_idle()


async def test_a_node_whose_kv_is_wider_refuses_the_link_and_says_why(system: Deployment) -> None:
    records = await system.records()
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(7, 70))
    (alone,) = poisoned_engine(kv_cache_dtype="fp8").generate([prompt], params)
    async with system.redis_client() as redis:
        answer = await dispatch(redis, "stale", prompt, params, records["prefill"], records["other"])
    assert answer.failed is None, (answer.failed, system.logs())
    assert answer.token_ids == alone.token_ids
    assert answer.took_over <= {records[name].incarnation for name in ("over-shm", "over-tcp")}
    refused = [line for line in system.logs().splitlines() if "link.refused" in line]
    assert any("float8_e4m3fn" in line and "float32" in line for line in refused), refused
    await system.assert_idle()
