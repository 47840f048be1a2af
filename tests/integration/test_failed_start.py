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
from typing import Any, NoReturn, TypeVar

import pytest

from common.engine import Engine
from common.engine.runner.model_runner import ModelRunner
from common.errors import ConfigError, EngineBroken, PdqError, ResourceError, ServiceUnavailable
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
from tests.support.redis import HANGS_S, wait_until

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
    assert node.links.transports == (), "nothing but the engine uses the device while it warms up"
    look_is_over.set()
    await wait_until(lambda: node.state is NodeState.READY, "it is ready")
    assert node.links.transports
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


def fail(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("nobody thought of this")


async def fail_soon() -> None:
    fail()


FAILURES: dict[str, Callable[[Node], object]] = {
    "a background task": lambda node: node.spawn(fail_soon()),
    "a timer, such as a grant's": lambda _: asyncio.get_running_loop().call_later(0.0, fail),
    "what a thread asks for": lambda _: asyncio.get_running_loop().call_soon_threadsafe(fail),
    "a timer of handoffs": lambda node: setattr(node.links._handoff, "tick", fail),
    "a copy": lambda node: node.links._ends.spawn(fail_soon()),
    "a beat of the bus": lambda node: setattr(node.bus._links, "tick", fail),
}


@pytest.mark.parametrize("what", FAILURES)
async def test_a_node_in_which_something_fails_in_the_background_drains_and_ends_with_the_error(
    redis_client: RedisClient, what: str
) -> None:
    """What it was about is in an unknown state: gateways try it elsewhere."""
    bus = bus_settings(beat_interval_s=0.05)
    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus)
    node = await asyncio.to_thread(lambda: Node(settings))
    running = asyncio.create_task(node.run())
    await wait_until(lambda: node.state is NodeState.READY, "it is ready", 30.0)
    FAILURES[what](node)
    with pytest.raises(RuntimeError, match="nobody thought of this"):
        await asyncio.wait_for(running, HANGS_S)
    assert node.state is NodeState.DRAINING


async def test_a_loop_that_fails_while_its_node_drains_ends_it_before_the_grace_period_is_over(
    redis_client: RedisClient,
) -> None:
    """Such as a step that turns out to hang: nothing that still runs could come to its end."""
    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings())
    settings = dataclasses.replace(settings, grace_period_s=1e6)
    node = await asyncio.to_thread(lambda: Node(settings))

    async def hang() -> None:
        await wait_until(lambda: node.state is NodeState.DRAINING, "it drains", HANGS_S)
        raise EngineBroken("a step took too long")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.steps, "run", hang)
        patch.setattr(type(node.role), "num_open", 1)
        running = asyncio.create_task(node.run())
        await wait_until(lambda: node.state is NodeState.READY, "it is ready", 30.0)
        node.stop()
        with pytest.raises(EngineBroken, match="a step took too long"):
            await asyncio.wait_for(running, HANGS_S)


async def test_a_step_that_hangs_holds_up_the_end_of_its_node_for_the_grace_period_only(
    redis_client: RedisClient,
) -> None:
    """Also before the stall limit has found it out. Its memory is left to it: it may still write."""
    goes_on, begun = threading.Event(), threading.Event()

    class Hanging(ModelRunner):
        def submit(self, *step: Any) -> Any:
            if step[0] is not None:
                return super().submit(*step)
            begun.set()
            goes_on.wait()
            raise RuntimeError("it went on")

    settings = NodeSettings(engine=ENGINE, redis=redis_client.settings, bus=bus_settings())
    settings = dataclasses.replace(settings, grace_period_s=0.0)
    node = await asyncio.to_thread(lambda: Node(settings, make_runner=Hanging))
    running = asyncio.create_task(node.run())
    await wait_until(lambda: node.state is NodeState.READY, "it is ready", 30.0)
    hangs = node.engine.runner.submit(None)  # type: ignore[arg-type]
    try:
        await wait_until(begun.is_set, "the engine's thread is in the step")
        node.stop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node.memory, "close", fail)
            with pytest.raises(EngineBroken, match=r"did not end within 1 s"):
                await asyncio.wait_for(running, HANGS_S)
    finally:
        goes_on.set()
        assert isinstance(await asyncio.to_thread(hangs.exception), RuntimeError)
        node.engine.runner.close()
        node.memory.close()


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
