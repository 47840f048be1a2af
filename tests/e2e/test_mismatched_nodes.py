"""Nodes that differ in what must be equal: nothing is served, and one line says why and what to do."""

from __future__ import annotations

import asyncio
import time

import httpx

from common.registry import NodeState
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment

LIMIT_S = 120.0


async def test_the_gateway_names_the_field_both_values_and_the_nodes() -> None:
    system = Deployment(STORIES)
    system.redis.start()
    try:
        system.start_gateway("gateway")
        system.start_node("prefill", "prefill")
        system.flags = ("--dtype", "bfloat16")
        system.start_node("decode", "decode")
        deadline = time.monotonic() + LIMIT_S
        reason = ""
        while "go together" not in reason:
            assert time.monotonic() < deadline, (reason, system.logs())
            records = await system.records()
            if len(records) == 3 and all(r.state is NodeState.READY for r in records.values()):
                async with httpx.AsyncClient(base_url=records["gateway"].url) as client:
                    reply = await client.get("/ready")
                assert reply.status_code == 503
                reason = reply.json()["reason"]
            await asyncio.sleep(0.1)
    finally:
        system.stop()
    prefill, decode = records["prefill"], records["decode"]
    assert reason == (
        f"no prefill and decode nodes that go together: layout is {prefill.layout!r} at "
        f"{prefill.incarnation} and {decode.layout!r} at {decode.incarnation}; start them with the "
        "same model, version and settings"
    )
