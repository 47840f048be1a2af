"""What fails on its way up leaves nothing: no key, no descriptor, no thread, no socket file."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from common.engine import Engine
from common.errors import ConfigError, PdqError, ResourceError, ServiceUnavailable
from common.node.app import Node
from common.settings.config import (
    EngineSettings,
    GatewaySettings,
    MetricsSettings,
    NodeSettings,
    RedisSettings,
)
from common.store.client import RedisClient, text
from common.store.queue import NodeQueue
from common.store.reaper import Reaper
from common.store.registry import NodeState, Registry
from common.wire.bus import Bus, Down
from gateway import __main__ as gateway
from tests.support.bus_key import bus_settings
from tests.support.checkpoints import STORIES
from tests.support.gateway_server import LazyForker
from tests.support.holdings import holdings
from tests.support.redis import wait_until

ENGINE = EngineSettings(
    model=str(STORIES),
    dtype="float32",
    threads=1,
    num_kv_blocks=64,
    max_num_seqs=4,
    max_num_batched_tokens=256,
)
S = TypeVar("S", NodeSettings, GatewaySettings)
Refusal = tuple[type[PdqError], str]


class Spoil:
    """Settings of which one cannot be had."""

    def __init__(self, tmp: Path, taken_port: int) -> None:
        self._tmp, self._taken_port = tmp, taken_port

    def bus_port(self, settings: S) -> S:
        return dataclasses.replace(settings, bus=bus_settings(port=self._taken_port))

    def metrics_port(self, settings: NodeSettings) -> NodeSettings:
        return dataclasses.replace(settings, metrics=MetricsSettings(port=self._taken_port))

    def last_transport(self, settings: NodeSettings) -> NodeSettings:
        """The ones before it are there already."""
        folder = str(self._tmp / "no" / "such" / "folder")
        return dataclasses.replace(settings, transports=("tcp", "shm"), shm_dir=folder)


@pytest.fixture
def spoil(tmp_path: Path) -> Iterator[Spoil]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield Spoil(tmp_path, taken.getsockname()[1])


async def refused_start(settings: NodeSettings, client: RedisClient) -> Refusal:
    """Start a node in this process, in vain; nothing of it is left. Its error."""

    async def start() -> None:
        node = await asyncio.to_thread(Node, settings)
        await node.run()

    return await nothing_left(start, client)


async def nothing_left(start: Callable[[], Awaitable[None]], client: RedisClient) -> Refusal:
    before, threads = holdings(os.getpid()), set(threading.enumerate())
    error = await refusal(start)
    gc.collect()  # the pool's mapping ends with the last tensor over it
    assert holdings(os.getpid()).descriptors <= before.descriptors
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if not name.startswith("asyncio_")}  # the loop's own
    keys = {text(key) for key in await client.command("KEYS", "*")}
    assert keys <= client.keys.permanent()
    assert await client.command("ZCARD", client.keys.nodes()) == 0
    return error


async def refusal(start: Callable[[], Awaitable[None]]) -> Refusal:
    """Not the error itself, which holds what was there when it was raised."""
    try:
        await start()
    except PdqError as error:
        return type(error), str(error)
    raise AssertionError("it started")


@pytest.mark.parametrize(
    ("step", "error"),
    [("bus_port", ResourceError), ("metrics_port", ResourceError), ("last_transport", ConfigError)],
)
async def test_a_setting_that_ends_the_start_leaves_nothing(
    step: str, error: type[PdqError], spoil: Spoil, redis_client: RedisClient
) -> None:
    change: Callable[[NodeSettings], NodeSettings] = getattr(spoil, step)
    settings = change(NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings()))
    refused, _ = await refused_start(settings, redis_client)
    assert refused is error


@pytest.mark.parametrize(
    ("part", "step"), [(NodeQueue, "open"), (Bus, "start"), (Engine, "warm_up"), (Registry, "announce")]
)
async def test_a_part_that_fails_at_the_start_leaves_nothing(
    part: type, step: str, redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`shm` in a folder: its socket is a file there while the node lives."""

    def fail(*_: object) -> None:
        raise ServiceUnavailable(step)

    monkeypatch.setattr(part, step, fail)
    settings = NodeSettings(
        engine=ENGINE, redis=redis_client.settings, shm_dir=str(tmp_path), bus=bus_settings()
    )
    assert await refused_start(settings, redis_client) == (ServiceUnavailable, step)
    assert not os.listdir(tmp_path)


async def test_a_node_that_takes_long_to_start_leaves_no_trace_to_be_reaped_before_it_is_ready(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    warming, look_is_over = threading.Event(), threading.Event()

    def warm_up(_: Engine) -> None:
        warming.set()
        assert look_is_over.wait(30)

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings())
    node = await asyncio.to_thread(Node, settings)
    running = asyncio.create_task(node.run())
    now = [0.0]
    reaper = Reaper(redis_client, "reaper", clock=lambda: now[0])
    await asyncio.to_thread(warming.wait, 30)
    for now[0] in (0.0, 50.0, 100.0):
        assert (await reaper.sweep()).incarnations == ()
    look_is_over.set()
    await wait_until(lambda: node.state is NodeState.READY, "it is ready")
    assert await redis_client.command("EXISTS", redis_client.keys.stream(node.incarnation))
    node.stop()
    await running


async def test_a_node_that_ends_says_goodbye_however_long_redis_takes_to_hear_of_it(
    redis_client: RedisClient,
) -> None:
    """Gateways retry what it had when they hear that, and need no Redis for it."""

    class Ending(Bus):
        async def close(self, *, goodbye: bool = True) -> None:
            await redis_client.command("CLIENT", "PAUSE", "600000", "WRITE")
            await super().close(goodbye=goodbye)

    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings())
    node = await asyncio.to_thread(lambda: Node(settings, make_bus=Ending))
    async with Bus("gateway-1", bus_settings()) as peer:
        running = asyncio.create_task(node.run())
        await wait_until(lambda: node.state is NodeState.READY, "it is ready", 30.0)
        peer.connect(node.incarnation, node.bus.endpoint)
        assert (await peer.next_event()).up
        node.stop()
        try:
            assert (await peer.next_event()).reason is Down.GOODBYE
            beat = redis_client.keys.beat(node.incarnation)
            assert await redis_client.command("EXISTS", beat) == 1, "it has left already"
        finally:
            await redis_client.command("CLIENT", "UNPAUSE")
        await running


async def test_a_node_in_which_a_background_task_fails_drains_and_ends_with_the_error(
    redis_client: RedisClient,
) -> None:
    """What the task was about is in an unknown state: gateways try it elsewhere."""
    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings())
    node = await asyncio.to_thread(lambda: Node(settings))
    running = asyncio.create_task(node.run())
    await wait_until(lambda: node.state is NodeState.READY, "it is ready", 30.0)

    async def fails() -> None:
        raise RuntimeError("nobody thought of this")

    node.spawn(fails())
    with pytest.raises(RuntimeError, match="nobody thought of this"):
        await asyncio.wait_for(running, 10.0)
    assert node.state is NodeState.DRAINING


def test_a_node_that_may_open_too_few_files_says_so_and_does_not_start() -> None:
    """libzmq would end it in the middle of its work."""
    limited = ["bash", "-c", 'ulimit -n 100; exec "$@"', "bash"]
    node = [sys.executable, "-m", "common.node", "--redis-url", "redis://127.0.0.1:1"]
    ended = subprocess.run([*limited, *node], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "100 open files are allowed (ulimit -n), a node needs at least 256" in line


async def test_an_engine_that_cannot_be_made_leaves_nothing(redis_client: RedisClient) -> None:
    before, threads = holdings(os.getpid()), threading.active_count()
    settings = NodeSettings(
        engine=dataclasses.replace(ENGINE, model="/no/such/model"),
        redis=redis_client.settings,
        bus=bus_settings(),
    )
    with pytest.raises(PdqError):
        Node(settings)
    assert holdings(os.getpid()) == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("step", ["redis", "bus"])
async def test_a_gateway_that_does_not_start_leaves_nothing(
    step: str, redis_client: RedisClient, spoil: Spoil
) -> None:
    settings = GatewaySettings(model=str(STORIES), redis=redis_client.settings, port=0)
    if step == "redis":
        nowhere = RedisSettings(url="nowhere")
        settings = dataclasses.replace(settings, redis=nowhere)
    else:
        settings = spoil.bus_port(settings)
    models = gateway.load_models(settings)
    with contextlib.closing(LazyForker(models)) as forker:
        refused, _ = await nothing_left(
            lambda: gateway.run(settings, "gateway-1", models, forker), redis_client
        )
    assert refused is {"redis": ConfigError, "bus": ResourceError}[step]
