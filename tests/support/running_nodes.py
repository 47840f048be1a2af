"""Whole nodes in the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from common.node.app import Node
from common.settings.config import EngineSettings, MetricsSettings, NodeSettings
from common.store.client import RedisClient
from common.store.registry import NodeRecord, NodeState
from tests.support.bus_key import bus_settings
from tests.support.redis import wait_until


@contextlib.asynccontextmanager
async def running(
    redis: RedisClient,
    engine: EngineSettings,
    *roles: str,
    metrics: MetricsSettings = MetricsSettings(),  # noqa: B008
) -> AsyncIterator[list[NodeRecord]]:
    """Nodes of these roles in this process; what they say of themselves. Afterwards nothing is left
    in them."""
    nodes = [
        await asyncio.to_thread(
            Node,
            NodeSettings(
                role=role,
                engine=engine,
                redis=redis.settings,
                bus=bus_settings(),  # type: ignore[arg-type]
                transports=("shm",),
                metrics=metrics,
            ),
        )
        for role in roles
    ]
    tasks = [asyncio.create_task(node.run()) for node in nodes]
    for node in nodes:
        await wait_until(lambda node=node: node.state is NodeState.READY, "it is ready")
    yield [node.record() for node in nodes]
    for node in nodes:
        node.stop()
    await asyncio.gather(*tasks)
    for node in nodes:
        node.engine.check_idle()
