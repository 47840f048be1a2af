"""Gateways that drain, die, and stand beside each other."""

from __future__ import annotations

import asyncio

import httpx

from common.engine import Engine
from common.store.reaper import GATEWAY_LOST, Reaper
from common.store.requests import Requests
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

LOAD = bodies(20, seed=7)


async def test_a_gateway_that_is_told_to_end_serves_its_clients_first(
    system: Deployment, engine: Engine
) -> None:
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 2, "some streams run")
        ended = asyncio.create_task(system.terminate("gateway"))
        await load.finish(expected)
        assert await ended == 0


async def test_two_gateways_serve_at_once(system: Deployment, engine: Engine) -> None:
    expected = truth(engine, LOAD)
    system.start_gateway("other")
    await system.wait_ready()
    async with Load(system.url, LOAD) as one, Load(system.urls["other"], LOAD) as two:
        await one.finish(expected)
        await two.finish(expected)
    assert await system.terminate("other") == 0


async def test_the_death_of_a_gateway_ends_its_requests_everywhere(
    system: Deployment, engine: Engine
) -> None:
    expected = truth(engine, LOAD)
    system.start_gateway("other")
    await system.wait_ready()
    dead = (await system.records())["gateway"].incarnation
    endless = [body | {"n": 8, "max_tokens": 300, "ignore_eos": True} for body in LOAD]
    async with Load(system.url, endless) as load:
        await wait_until(lambda: load.num_begun >= 2, "some streams run")
        system.kill("gateway")
        for outcome in await asyncio.gather(*load.tasks, return_exceptions=True):
            assert isinstance(outcome, httpx.TransportError)
    await system.assert_idle()
    async with Load(system.urls["other"], LOAD) as load:
        await load.finish(expected)

    async with system.redis_client() as client:
        requests = Requests(client)
        left = await requests.open_requests(dead)
        assert len(left) == len(LOAD)
        reaper = Reaper(client, "test", dead_after_s=2.0)

        async def reaped() -> bool:
            return dead in (await reaper.sweep()).incarnations

        await wait_until(reaped, "the dead gateway is reaped")
        assert await requests.open_requests(dead) == set()
        for record in await requests.get_all(sorted(left)):
            assert record is not None
            assert {choice.error for choice in record.choices} == {GATEWAY_LOST}
    assert await system.terminate("other") == 0
