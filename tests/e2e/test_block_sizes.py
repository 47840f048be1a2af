"""A fleet with several block sizes: prompts are converted on their way in, and the tokens are the same.

Between processes and over HTTP, through a gateway that has no idea; held against the in-process
engine, whose block size is its own again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from common.engine import Completion, SamplingParams
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment, complete
from tests.support.dispatching import dispatch
from tests.support.engines import poisoned_engine
from tests.support.load import Load, bodies, truth
from tests.support.metrics import scrape
from tests.support.redis import wait_until

# transport, block size of the prefill node, and of the decode node
FLEETS = [
    pytest.param(("shm", 16, 32)),
    pytest.param(("tcp", 16, 32), marks=pytest.mark.slow),  # the others have both halves of it
    pytest.param(("tcp", 48, 8)),
]
POSITIONS = 8192  # of each pool: several choices need room for a prompt each, where delta is off
BODIES = bodies(24, max_tokens=(1, 60), prompt=(1, 200), seed=7)


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    return truth(poisoned_engine(max_num_seqs=16), BODIES)


@pytest.fixture(scope="module", params=FLEETS, ids=lambda fleet: "{} {} to {}".format(*fleet))
def fleet(request: pytest.FixtureRequest) -> Iterator[tuple[Deployment, int, int]]:
    transport, theirs, ours = request.param
    system = Deployment(STORIES)
    system.redis.start()
    try:
        system.start_gateway("gateway")
        for role, size in (("prefill", theirs), ("decode", ours)):
            system.flags = (
                "--transports",
                transport,
                "--block-size",
                str(size),
                "--num-kv-blocks",
                str(POSITIONS // size),
            )
            system.start_node(role, role)
        asyncio.run(system.wait_ready())
        yield system, theirs, ours
    finally:
        system.stop()


async def received_blocks(system: Deployment) -> int:
    """Blocks that the decode node has copied."""
    await system.assert_idle()
    decode = (await system.records())["decode"]
    return int((await scrape(decode.url)).total("pdq_received_blocks_total"))


async def test_greedy_and_seeded_requests_get_the_engines_tokens(
    fleet: tuple[Deployment, int, int], expected: list[list[Completion]]
) -> None:
    system, theirs, ours = fleet
    for _ in range(2):  # the second time the prefill node has their prefixes
        async with Load(system.url, BODIES) as load:
            await load.finish(expected)
    await system.assert_idle()
    said = f"blocks of {theirs} positions are converted to {ours}, delta is off"

    async def shown() -> bool:
        return bool(await system.kv_links("prefill"))

    await wait_until(shown, "the records show the link")
    records = await system.records()
    for name in ("prefill", "decode"):
        links = await system.kv_links(name)
        assert links, f"{name} has no link"
        assert all(said in link["reason"] for link in links)
    assert f"link.differs peer={records['prefill'].incarnation}" in system.logs()


async def test_every_block_is_sent_each_time_and_is_prefix_cache_there(
    fleet: tuple[Deployment, int, int],
) -> None:
    """In blocks of the sender's as they come; then by hashes of its own: asked to compute the same
    prompt itself, the decode node has all of it but the last, partly filled block."""
    system, theirs, ours = fleet
    prompt = [1, *range(3, 3 + 200)]
    before = await received_blocks(system)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    (completion,) = poisoned_engine().generate([prompt], params)
    async with httpx.AsyncClient() as client:
        for _ in range(2):
            result = await complete(
                client,
                system.url,
                model=STORIES.name,
                prompt=prompt,
                max_tokens=5,
                temperature=0.0,
                ignore_eos=True,
                return_token_ids=True,
            )
            assert tuple(result["choices"][0]["token_ids"]) == completion.token_ids
    assert await received_blocks(system) - before == 2 * -(-len(prompt) // theirs)
    decode = (await system.records())["decode"]
    async with system.redis_client() as redis:
        answer = await dispatch(redis, "again", prompt, params, decode)
    assert answer.token_ids == completion.token_ids
    assert answer.cached_tokens == len(prompt) // ours * ours
