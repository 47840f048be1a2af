"""SIGTERM of a node under load: it finishes or hands over what it has, and nobody notices."""

from __future__ import annotations

import pytest

from common.engine import Engine
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

LOAD = bodies(24, seed=5)


@pytest.mark.parametrize("name", ["prefill-0", "decode-2"])
async def test_a_node_that_is_told_to_end_finishes_what_it_has(
    system: Deployment, engine: Engine, name: str
) -> None:
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 2, "some streams run")
        assert load.num_open >= 20
        assert await system.terminate(name) == 0
        await load.finish(expected)


async def test_the_last_decode_node_drains_and_the_next_one_goes_on(
    system: Deployment, engine: Engine
) -> None:
    """Prompts that find no decode node wait for the one that is on its way."""
    system.kill("decode-3")
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 2, "some streams run")
        system.start_missing()
        assert await system.terminate("decode-2") == 0
        await load.finish(expected, may_fail=True)
