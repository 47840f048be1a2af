"""Only what the decode node lacks is sent: counted in blocks, over real processes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from common.engine import SamplingParams
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment, complete
from tests.support.engines import poisoned_engine
from tests.support.metrics import scrape

BLOCK = 16

TCP = pytest.param("tcp", marks=pytest.mark.slow)  # test_block_sizes.py counts its blocks
NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None, reason="nixl is not installed (pip install pdq[nixl])"
    ),
)


@pytest.fixture(scope="module", params=["shm", TCP, NIXL])
def system(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    flags = ("--transports", request.param)
    with Deployment(STORIES, prefill=1, decode=1, flags=flags) as deployment:
        yield deployment


async def copied(system: Deployment) -> int:
    """Blocks that the decode node has copied."""
    await system.assert_idle()
    decode = (await system.records())["decode-1"]
    return int((await scrape(decode.url)).total("pdq_received_blocks_total"))


async def test_a_second_turn_sends_only_the_blocks_that_are_new(system: Deployment) -> None:
    """First turn: all blocks. Second: those after the last full block of the first turn, whose reply counts
    where replies have the bits of prompts. The same again: its tail alone."""
    engine = poisoned_engine(max_num_seqs=16)
    random = np.random.default_rng(11)
    first = [1, *random.integers(3, 512, 149).tolist()]  # 9 full blocks and a tail of 6
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    counts = [0]
    async with httpx.AsyncClient() as client:

        async def ask(prompt: list[int]) -> list[int]:
            (truth,) = engine.generate([prompt], params)
            result = await complete(
                client,
                system.url,
                model=STORIES.name,
                prompt=prompt,
                max_tokens=20,
                temperature=0.0,
                ignore_eos=True,
                return_token_ids=True,
            )
            reply = result["choices"][0]["token_ids"]
            assert tuple(reply) == truth.token_ids
            counts.append(await copied(system))
            return list(reply)

        reply = await ask(first)
        second = [*first, *reply, *random.integers(3, 512, 60).tolist()]  # 230: 14 full and a tail
        await ask(second)
        await ask(second)
    sent = [after - before for before, after in itertools.pairwise(counts)]
    computed = len(first) + len(reply) - 1  # the last token of a reply is read by nobody
    kept = min(computed, engine.fingerprint.border(len(first)))
    assert sent == [len(first) // BLOCK + 1, len(second) // BLOCK - kept // BLOCK + 1, 1]
