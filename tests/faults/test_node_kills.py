"""kill -9 of a node, whenever: every request ends, with the tokens it would have had anyway."""

from __future__ import annotations

import signal

import pytest

from common.engine import Engine
from common.store.request_record import RequestRecord
from common.store.request_state import State
from common.store.requests import Requests
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

LOAD = bodies(24)


async def open_records(system: Deployment) -> list[RequestRecord]:
    async with system.redis_client() as client:
        recent = await Requests(client).recent()
    return [record for record in recent if not record.state.terminal]


@pytest.mark.parametrize("name", ["prefill-0", "decode-2"])
async def test_under_load_the_others_take_over(system: Deployment, engine: Engine, name: str) -> None:
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 4, "some streams run")
        assert load.num_open >= 20
        system.kill(name)
        await load.finish(expected)
    await system.assert_idle()


@pytest.mark.slow  # as test_handoff_chaos.py does before the first OFFER
async def test_prefill_dies_while_it_computes_prompts(system: Deployment, engine: Engine) -> None:
    asked = bodies(16, prompt=(400, 450), max_tokens=(20, 40))
    expected = truth(engine, asked)
    async with Load(system.url, asked) as load:
        records: list[RequestRecord] = []

        async def computing() -> bool:
            records[:] = await open_records(system)
            return any(r.state is State.PREFILLING for r in records)

        await wait_until(computing, "a node has claimed a prompt")
        system.kill("prefill-0")
        await load.finish(expected)
    await system.assert_idle()


async def test_prefill_dies_between_first_token_and_handover(system: Deployment, engine: Engine) -> None:
    asked = bodies(8, max_tokens=(20, 40))
    expected = truth(engine, asked)
    for decode in ("decode-2", "decode-3"):
        system.signal(decode, signal.SIGSTOP)  # nobody answers an offer now
    async with Load(system.url, asked) as load:
        await wait_until(lambda: load.num_begun == 4, "all streams have a first token")
        assert all(len(ids) == 1 for c in load.clients for ids in c.token_ids.values())
        system.kill("prefill-0")
        system.kill("prefill-1")
        system.start_missing()
        for decode in ("decode-2", "decode-3"):
            system.signal(decode, signal.SIGCONT)
        await load.finish(expected, may_fail=True)
    await system.assert_idle()


async def test_decode_dies_right_after_it_took_over(system: Deployment, engine: Engine) -> None:
    asked = bodies(4, max_tokens=(300, 300))
    expected = truth(engine, asked)
    async with Load(system.url, asked) as load:
        holders: set[str] = set()

        async def taken_over() -> bool:
            for record in await open_records(system):
                holders.update(c.decode_node for c in record.choices if c.decode_node)
            return bool(holders)

        await wait_until(taken_over, "a decode node has taken over")
        names = {r.incarnation: name for name, r in (await system.records()).items()}
        system.kill(names[holders.pop()])
        await load.finish(expected)
    await system.assert_idle()


async def test_a_stopped_decode_node_is_superseded_and_comes_back(system: Deployment, engine: Engine) -> None:
    asked = bodies(20, max_tokens=(150, 300))
    expected = truth(engine, asked)
    async with Load(system.url, asked) as load:
        await wait_until(lambda: load.num_begun >= 4, "some streams run")
        system.signal("decode-2", signal.SIGSTOP)
        await load.finish(expected)
        system.signal("decode-2", signal.SIGCONT)
        await system.assert_idle()
    system.kill("decode-3")  # the one that was stopped has to do it all now
    async with Load(system.url, asked[:6]) as load:
        await load.finish(expected[:6])
