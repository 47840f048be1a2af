"""Redis comes back empty: what was accepted goes on, and what comes next is accepted."""

from __future__ import annotations

import asyncio

from common.engine import Engine
from common.store.requests import Requests
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

LOAD = bodies(24, seed=9)


async def test_open_requests_outlive_redis(system: Deployment, engine: Engine) -> None:
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 1, "the first tokens are there")
        await asyncio.to_thread(system.redis.restart)
        async with Load(system.url, LOAD) as later:
            await load.finish(expected)
            await later.finish(expected)


async def test_what_is_open_is_asserted_again(system: Deployment, engine: Engine) -> None:
    asked = [body | {"n": 8, "max_tokens": 300, "ignore_eos": True} for body in LOAD]
    async with Load(system.url, asked) as load:
        await wait_until(lambda: load.num_begun >= 4, "some streams run")
        await asyncio.to_thread(system.redis.restart)
        gateways: set[str] = set()

        async def asserted() -> bool:
            async with system.redis_client() as client:
                recent = await Requests(client).recent()
            gateways.update(record.gateway for record in recent if not record.state.terminal)
            return len(recent) >= load.num_open // 2 and bool(gateways)

        async def announced() -> bool:
            return "gateway" in await system.records()

        await wait_until(asserted, "the gateway has asserted its requests again")
        await wait_until(announced, "the gateway has announced itself again")
        assert gateways == {(await system.records())["gateway"].incarnation}
