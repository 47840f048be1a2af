"""A request that kills or hangs the process that computes it: two nodes at most, and nobody else's
tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from common.engine import Engine
from common.store.requests import Requests
from tests.faults.conftest import BEATS
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Client, Load, bodies, truth
from tests.support.poisoned_node import HANGS, KILLS
from tests.support.redis import wait_until


class Poisonable(Deployment):
    """Of nodes that die of `KILLS` and hang at `HANGS`."""

    def command(self, name: str, module: str, *arguments: str) -> list[str]:
        nodes = "tests.support.poisoned_node"
        return super().command(name, nodes if module == "common.node" else module, *arguments)

    @property
    def dead(self) -> set[str]:
        return {name for name, process in self.processes.items() if process.poll() is not None}


@pytest.fixture(scope="module")
def three_by_one() -> Iterator[Poisonable]:
    flags = (*BEATS, "--bus-stall-limit-s", "3")
    with Poisonable(STORIES, prefill=3, decode=1, flags=flags, gateway_flags=flags) as system:
        yield system


@pytest.fixture
async def poisonable(three_by_one: Poisonable) -> AsyncIterator[Poisonable]:
    """All of them. Afterwards nothing may be left at those that live."""
    three_by_one.start_missing()
    await three_by_one.wait_ready()
    yield three_by_one
    for name in three_by_one.dead:
        three_by_one.kill(name)
    await three_by_one.assert_idle()


@pytest.mark.parametrize("poison", [KILLS, HANGS], ids=["kills", "hangs"])
async def test_a_prompt_that_ends_its_node_ends_after_two_and_alone(
    poisonable: Poisonable, engine: Engine, poison: list[int]
) -> None:
    asked = bodies(12, max_tokens=(20, 60))
    expected = truth(engine, asked)
    client = Client({"prompt": poison, "max_tokens": 5}, stream=False)
    async with Load(poisonable.url, asked) as load:
        await client.ask(load.http, poisonable.url)
        await load.finish(expected)
    assert client.status == 500
    assert client.error is not None
    assert client.error["code"] == "poisoned_request"
    await wait_until(lambda: len(poisonable.dead) == 2, "both processes are gone")
    async with poisonable.redis_client() as redis:
        letter, *_ = await Requests(redis).dead_letters()
        assert letter.dispatch is not None
        assert list(letter.dispatch.request.token_ids) == poison
        record = await Requests(redis).get(letter.request)
        assert record is not None
        assert {choice.error for choice in record.choices} == {"poisoned_request"}
