"""One prefill and one decode node: what was on the one that is killed waits for its next life."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.engine import Engine
from tests.faults.conftest import BEATS
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

LOAD = bodies(20, seed=13)


@pytest.fixture(scope="module")
def pair() -> Iterator[Deployment]:
    """What finds no decode node is given up after five seconds; a new life of one takes less."""
    gateway_flags = (*BEATS, "--placement-timeout-s", "5")
    with Deployment(STORIES, prefill=1, decode=1, flags=BEATS, gateway_flags=gateway_flags) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("name", "restarted"), [("prefill-0", True), ("decode-1", True), ("decode-1", False)]
)
async def test_every_request_ends(pair: Deployment, engine: Engine, name: str, restarted: bool) -> None:
    expected = truth(engine, LOAD)
    async with Load(pair.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 3, "some streams run")
        pair.kill(name)
        if restarted:
            pair.start_missing()
        await load.finish(expected, may_fail=True)
    if not restarted:
        assert any(client.error for client in load.clients)
    await pair.assert_idle()
    pair.start_missing()
    await pair.wait_ready()
    async with Load(pair.url, LOAD[:4]) as load:
        await load.finish(expected[:4])
    await pair.assert_idle()
