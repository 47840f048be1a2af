"""A request that kills the process that computes it: two nodes at most, and nobody else's tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.engine import Engine
from common.requests import Requests
from tests.faults.conftest import BEATS
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Client, Load, bodies, truth
from tests.support.poisoned_node import POISON


class Poisonable(Deployment):
    """Of nodes that die of `POISON`."""

    def command(self, name: str, module: str, *arguments: str) -> list[str]:
        nodes = "tests.support.poisoned_node"
        return super().command(name, nodes if module == "common.node" else module, *arguments)

    @property
    def dead(self) -> set[str]:
        return {name for name, process in self.processes.items() if process.poll() is not None}


@pytest.fixture
def poisonable() -> Iterator[Poisonable]:
    with Poisonable(STORIES, prefill=3, decode=1, flags=BEATS, gateway_flags=BEATS) as system:
        yield system


async def test_a_prompt_that_kills_its_node_ends_after_two_and_alone(
    poisonable: Poisonable, engine: Engine
) -> None:
    asked = bodies(12, max_tokens=(20, 60))
    expected = truth(engine, asked)
    poison = Client({"prompt": POISON, "max_tokens": 5}, stream=False)
    async with Load(poisonable.url, asked) as load:
        await poison.ask(load._http, poisonable.url)
        await load.finish(expected)
    assert poison.status == 500
    assert poison.error is not None
    assert poison.error["code"] == "poisoned_request"
    assert len(poisonable.dead) == 2
    async with poisonable.redis_client() as client:
        (letter,) = await Requests(client).dead_letters()
        assert list(letter.dispatch.token_ids) == POISON
        record = await Requests(client).get(letter.request)
        assert record is not None
        assert {choice.error for choice in record.choices} == {"poisoned_request"}
    for name in poisonable.dead:
        poisonable.kill(name)
    poisonable.start_missing()
    await poisonable.wait_ready()
    await poisonable.assert_idle()
