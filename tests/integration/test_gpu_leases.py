"""Leases on GPUs in a real Redis: nobody shares one in silence, whoever is killed, stopped or forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from common.commands import inspect
from common.errors import ConfigError, EngineBroken, ResourceError, ServiceUnavailable
from common.gpu import Gpu
from common.node import gpu_lease
from common.node.app import Node
from common.node.gpu_lease import GpuLease
from common.node.gpus import host_identity, take_gpu
from common.settings.config import EngineSettings, NodeSettings, RedisSettings
from common.store.client import RedisClient
from common.store.gpu_leases import GpuLeases, Held, Hold, Terms
from common.store.registry import NodeState
from common.store.server import EmbeddedRedis
from tests.support.bus_key import bus_settings
from tests.support.checkpoints import STORIES
from tests.support.gpu_holder import HOST, TIMES, gpus
from tests.support.pretended_gpus import OnCpu, PretendedGpus
from tests.support.redis import HANGS_S, wait_until

ALONE = Terms(900)
ENGINE = EngineSettings(model=str(STORIES), dtype="float32", threads=1, num_kv_blocks=64, max_num_seqs=4)


class Holder:
    """A process of gpu_holder.py."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(HANGS_S):
            return (await self.process.stdout.readline()).decode().strip()

    def ask(self) -> None:
        """For a step."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def step(self) -> str:
        self.ask()
        return await self.line()


@pytest.fixture
async def start(redis_client: RedisClient) -> AsyncIterator[Callable[..., Any]]:
    """Start a holder: `await start(name, count)`. Killed at the end."""
    holders: list[Holder] = []

    async def begin(name: str, count: int) -> Holder:
        module = ("-m", "tests.support.gpu_holder", redis_client.settings.url, name, str(count))
        process = await asyncio.create_subprocess_exec(sys.executable, *module, stdin=PIPE, stdout=PIPE)
        holders.append(Holder(process))
        return holders[-1]

    yield begin
    for holder in holders:
        with contextlib.suppress(ProcessLookupError):
            holder.process.kill()
        await holder.process.communicate()


@pytest.fixture
def claim(redis_client: RedisClient) -> Iterator[Callable[..., GpuLease]]:
    """A lease in this process, `claim(name, gpus, terms)`; all of them are closed at the end."""
    leases: list[GpuLease] = []

    def make(name: str, candidates: Sequence[Gpu], terms: Terms = ALONE) -> GpuLease:
        leases.append(GpuLease.claim(redis_client.settings, HOST, name, candidates, terms, TIMES))
        return leases[-1]

    yield make
    for lease in leases:
        lease.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-lease"]


def others(
    client: RedisClient, name: str = "other", terms: Terms = ALONE, ttl_s: float = TIMES.ttl_s
) -> GpuLeases:
    """What another process says to Redis."""
    return GpuLeases(client, HOST, name, terms, ttl_s=ttl_s, settle_s=TIMES.settle_s)


async def holders(client: RedisClient, uuid: str = "GPU-0000") -> set[bytes]:
    return set(await client.command("HKEYS", client.keys.gpu(HOST, uuid)))


async def lease_is_over(client: RedisClient, holder: str) -> None:
    key = client.keys.gpu(HOST, "GPU-0000")

    async def is_over() -> bool:
        stored, time = await client.pipeline(("HGET", key, holder), ("TIME",))
        return int(stored.split()[0]) < int(time[0]) * 1000

    await wait_until(is_over, "the lease is over")


async def test_nodes_that_race_get_a_gpu_each_and_the_others_hear_who_has_them(
    start: Callable[..., Any],
) -> None:
    racers = await asyncio.gather(*(start(f"node-{number}", 3) for number in range(5)))
    said = await asyncio.gather(*(racer.line() for racer in racers))
    assert sorted(line for line in said if line.startswith("holds")) == ["holds 0", "holds 1", "holds 2"]
    refused = [line for line in said if line.startswith("refused")]
    assert len(refused) == 2
    winners = [f"node-{number}" for number, line in enumerate(said) if line.startswith("holds")]
    for line in refused:
        assert "no GPU is left: all 3 GPUs are held, GPU 0 (Pretended, GPU-0000) by node-" in line
        assert all(winner in line for winner in winners)
        assert "--share-gpu" in line


async def test_the_gpu_of_a_killed_node_is_waited_for_and_taken(start: Callable[..., Any]) -> None:
    """Whoever starts it again starts it at once."""
    first = await start("first", 1)
    assert await first.line() == "holds 0"
    first.process.kill()
    await first.process.wait()
    second = await start("second", 1)
    assert await second.line() == "holds 0"


async def test_a_node_that_was_stopped_too_long_computes_nothing_more_and_ends(
    start: Callable[..., Any],
) -> None:
    stopped = await start("stopped", 1)
    assert await stopped.line() == "holds 0"
    assert await stopped.step() == "step"
    stopped.process.send_signal(signal.SIGSTOP)
    second = await start("second", 1)
    assert await second.line() == "holds 0"
    stopped.ask()  # before it runs again
    stopped.process.send_signal(signal.SIGCONT)
    said = await stopped.line()
    assert said.startswith("lost GPU 0 (Pretended, GPU-0000) was given to second while this node was stopped")
    assert await second.step() == "step"


async def test_a_node_that_was_stopped_while_nobody_wanted_its_gpu_computes_on(
    start: Callable[..., Any], redis_client: RedisClient
) -> None:
    stopped = await start("stopped", 1)
    assert await stopped.line() == "holds 0"
    stopped.process.send_signal(signal.SIGSTOP)
    await lease_is_over(redis_client, "stopped")
    stopped.ask()
    stopped.process.send_signal(signal.SIGCONT)
    assert await stopped.line() == "step"
    assert await holders(redis_client) == {b"stopped"}


async def test_a_node_that_ends_leaves_its_gpu_to_the_next_one_at_once(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    await asyncio.to_thread(lease.close)
    assert not await redis_client.command("KEYS", "pdq:gpu:*")


async def test_what_may_still_compute_keeps_its_gpu_until_the_lease_is_over(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    await asyncio.to_thread(lambda: lease.close(release=False))
    assert await holders(redis_client) == {b"first"}


async def test_redis_that_forgets_everything_costs_nobody_a_gpu(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    """Somebody who claims in that moment gives way, for he computes nothing yet."""
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    newcomer = others(redis_client)
    for _ in range(3):
        await redis_client.command("FLUSHALL")
        assert (await newcomer.hold("GPU-0000", Hold.CLAIM))[0] is not Held.SETTLED

        async def is_back() -> bool:
            return await holders(redis_client) == {b"first"}

        await wait_until(is_back, "the holder has said that it is there")
        held, found = await newcomer.hold("GPU-0000", Hold.SETTLE)
        assert (held, set(found)) == (Held.TAKEN, {"first"})
    await asyncio.to_thread(lease.require)


async def test_a_node_computes_on_while_redis_is_away_and_still_has_its_gpu_when_it_is_back(
    claim: Callable[..., GpuLease],
    redis_client: RedisClient,
    redis_server: EmbeddedRedis,
    start: Callable[..., Any],
) -> None:
    """For longer than a lease lasts: nobody can claim anything meanwhile."""
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    redis_server.stop()
    try:
        gone_at = gpu_lease.now()
        while gpu_lease.now() - gone_at < TIMES.ttl_s + 1.0:
            await asyncio.wait_for(asyncio.to_thread(lease.require), 1.0 + TIMES.stopped_s)
            await asyncio.sleep(0.1)
    finally:
        await asyncio.to_thread(redis_server.start)

    async def is_back() -> bool:
        with contextlib.suppress(ServiceUnavailable):
            return await holders(redis_client) == {b"first"}
        return False

    await wait_until(is_back, "the holder has said that it is there")
    second = await start("second", 1)
    assert "no GPU is left: the GPU is held" in await second.line()
    await asyncio.to_thread(lease.require)


async def test_an_answer_from_before_a_stop_says_nothing(
    claim: Callable[..., GpuLease], redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is stopped between Redis' answer and the moment at which it is read; when it goes on,
    its lease was over long ago, and another one has begun to compute."""
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    ahead = 0.0
    monkeypatch.setattr(gpu_lease, "now", lambda now=gpu_lease.now: now() + ahead)
    hold, answered = GpuLeases.hold, asyncio.Event()
    loop = asyncio.get_running_loop()

    async def hold_and_stop(self: GpuLeases, *asked: Any) -> Any:
        nonlocal ahead
        answer = await hold(self, *asked)
        if not answered.is_set():
            await others_take_it(self)
            ahead += 60.0
            loop.call_soon_threadsafe(answered.set)
        return answer

    async def others_take_it(of_thread: GpuLeases) -> None:
        client = of_thread._client
        await client.command("DEL", client.keys.gpu(HOST, "GPU-0000"))
        for how in (Hold.CLAIM, Hold.SETTLE):
            await hold(others(client), "GPU-0000", how)

    monkeypatch.setattr(GpuLeases, "hold", hold_and_stop)
    await asyncio.wait_for(answered.wait(), HANGS_S)
    with pytest.raises(EngineBroken, match="was given to other"):
        await asyncio.to_thread(lease.require)
    with pytest.raises(EngineBroken, match="was given to other"):
        await asyncio.wait_for(lease.until_lost(), HANGS_S)


async def test_a_lease_that_nobody_keeps_any_more_ends_its_node(
    claim: Callable[..., GpuLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await asyncio.to_thread(claim, "first", gpus(1))

    async def fail(*_: object) -> None:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr(GpuLeases, "hold", fail)
    with pytest.raises(EngineBroken, match="not kept any more"):
        await asyncio.wait_for(lease.until_lost(), HANGS_S)
    with pytest.raises(EngineBroken):
        lease.require()


async def test_those_who_share_a_gpu_have_no_more_than_all_of_its_memory(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    both = [asyncio.to_thread(claim, name, gpus(1), Terms(450, shared=True)) for name in ("first", "second")]
    assert [lease.gpu.index for lease in await asyncio.gather(*both)] == [0, 0]
    third = others(redis_client, "third", Terms(101, shared=True))
    assert (await third.hold("GPU-0000", Hold.CLAIM))[0] is Held.TAKEN
    third = others(redis_client, "third", Terms(100, shared=True))
    assert (await third.hold("GPU-0000", Hold.CLAIM))[0] is not Held.TAKEN
    await third.release("GPU-0000")
    with pytest.raises(ResourceError, match=r"by first, second; start fewer nodes.*--share-gpu"):
        await asyncio.to_thread(claim, "alone", gpus(1), Terms(100))


async def test_who_has_a_gpu_alone_shares_it_with_nobody(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    await asyncio.to_thread(claim, "first", gpus(1), Terms(300))
    with pytest.raises(ResourceError, match=r"the 20% of its memory.*lower --gpu-memory-utilization"):
        await asyncio.to_thread(claim, "second", gpus(1), Terms(200, shared=True))


async def test_a_gpu_that_nobody_can_have_is_had_at_once_and_one_that_somebody_may_have_is_not(
    claim: Callable[..., GpuLease], redis_client: RedisClient
) -> None:
    lease = await asyncio.to_thread(claim, "first", gpus(1))
    newcomer = others(redis_client, ttl_s=0.2)

    async def settles() -> bool:
        return (await newcomer.hold("GPU-0001", Hold.CLAIM))[0] is Held.SETTLED

    await wait_until(settles, "Redis has forgotten nothing for long enough")
    await asyncio.to_thread(lease.close)
    assert (await newcomer.hold("GPU-0000", Hold.CLAIM))[0] is Held.SETTLED  # it was released
    await lease_is_over(redis_client, "other")
    third = others(redis_client, "third")  # the other one may be cut off from Redis, and compute
    assert (await third.hold("GPU-0000", Hold.CLAIM))[0] is Held.FRESH
    assert (await others(redis_client).hold("GPU-0000", Hold.ASSERT))[0] is Held.SETTLED
    assert (await third.hold("GPU-0000", Hold.SETTLE))[0] is Held.TAKEN
    await newcomer.hold("GPU-0000", Hold.ASSERT)
    await lease_is_over(redis_client, "other")
    assert (await third.hold("GPU-0000", Hold.CLAIM))[0] is Held.FRESH
    assert (await third.hold("GPU-0000", Hold.SETTLE))[0] is Held.SETTLED
    assert await holders(redis_client) == {b"third"}


async def test_a_claim_without_redis_is_an_error_that_says_so() -> None:
    nowhere = RedisSettings(url="redis://127.0.0.1:1", retry_s=0.0)
    with pytest.raises(ServiceUnavailable):
        await asyncio.to_thread(GpuLease.claim, nowhere, HOST, "first", gpus(1), ALONE, TIMES)


# ── What the settings mean ───────────────────────────────────────────────────────────────────────


@pytest.fixture
async def take(redis_client: RedisClient) -> AsyncIterator[Callable[..., Any]]:
    """`await take(name, gpus, device, …)`: the engine's settings, and the lease, closed at the end."""
    leases: list[GpuLease | None] = []

    async def of(name: str, found: PretendedGpus, device: str = "cuda", nodes: int = 1, **fields: Any) -> Any:
        settings = NodeSettings(
            engine=replace(ENGINE, device=device, **fields), redis=redis_client.settings, gpu_nodes=nodes
        )
        engine, lease = await asyncio.to_thread(take_gpu, settings, name, gpus=found, times=TIMES)
        leases.append(lease)
        return engine, lease

    yield of
    for lease in leases:
        if lease is not None:
            await asyncio.to_thread(lease.close)


async def test_a_node_without_a_gpu_takes_none(take: Callable[..., Any]) -> None:
    assert await take("first", PretendedGpus(0), "auto") == (replace(ENGINE, device="auto"), None)
    assert await take("first", PretendedGpus(2), "cpu") == (replace(ENGINE, device="cpu"), None)
    with pytest.raises(ConfigError, match="device cuda is set, but torch finds no GPU"):
        await take("first", PretendedGpus(0), "cuda")


async def test_an_index_counts_what_this_process_sees_and_the_gpu_is_the_hosts(
    take: Callable[..., Any], redis_client: RedisClient
) -> None:
    """Two containers that see other GPUs of one host, one of them in common."""
    engine, lease = await take("first", PretendedGpus(8, [5, 2]), "cuda:1")
    assert (engine.device, lease.gpu.uuid) == ("cuda:1", "GPU-0002")
    with pytest.raises(ResourceError, match=r"GPU 0 \(Pretended, GPU-0002\) by first"):
        await take("second", PretendedGpus(8, [2, 3]), "cuda:0")
    engine, lease = await take("second", PretendedGpus(8, [2, 3]), "auto")
    assert (engine.device, lease.gpu.uuid) == ("cuda:1", "GPU-0003")
    with pytest.raises(ConfigError, match="cuda:2 is set, but torch finds 2 GPUs, cuda:0 to cuda:1"):
        await take("third", PretendedGpus(8, [2, 3]), "cuda:2")


async def test_nodes_that_are_more_than_gpus_share_them_evenly(take: Callable[..., Any]) -> None:
    found = await asyncio.gather(*(take(f"node-{n}", PretendedGpus(2), nodes=3) for n in range(3)))
    assert sorted(lease.gpu.index for _, lease in found) == [0, 0, 1]
    assert {engine.gpu_memory_utilization for engine, _ in found} == {0.45}
    assert all(engine.share_gpu for engine, _ in found)


def test_a_host_is_known_by_what_its_containers_share() -> None:
    assert host_identity() == host_identity() != os.uname().nodename
    assert len(host_identity()) == 36


# ── A whole node ─────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def ready_node(client: RedisClient) -> AsyncIterator[tuple[Node, asyncio.Task[None]]]:
    settings = NodeSettings(
        engine=replace(ENGINE, device="cuda"), redis=client.settings, bus=bus_settings(), transports=("shm",)
    )
    take = functools.partial(take_gpu, gpus=PretendedGpus(2), times=TIMES)
    node = await asyncio.to_thread(lambda: Node(settings, make_runner=OnCpu, take_gpu=take))
    running = asyncio.create_task(node.run())
    await wait_until(lambda: node.state is NodeState.READY or running.done(), "it is ready")
    yield node, running
    if not running.done():
        node.stop()
        await running


async def test_a_node_says_which_gpu_it_has_and_leaves_it(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ready_node(redis_client) as (node, _):
        record = node.record()
        assert (record.device, record.gpu, record.gpu_name) == ("cuda:0", "GPU-0000", "Pretended")
        assert await redis_client.command("KEYS", "pdq:gpu:*")
        monkeypatch.setenv("PDQ_REDIS_URL", redis_client.settings.url)
        assert await asyncio.to_thread(inspect.nodes, []) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert "DEVICE" in header.split()
        assert " cuda:0 Pretended GPU-0000 " in row
    assert not await redis_client.command("KEYS", "pdq:gpu:*")


async def test_a_node_whose_gpu_was_given_away_ends(redis_client: RedisClient) -> None:
    async with ready_node(redis_client) as (node, running):
        assert node.lease is not None
        uuid = node.lease.gpu.uuid
        theirs = GpuLeases(
            redis_client, host_identity(), "other", ALONE, ttl_s=TIMES.ttl_s, settle_s=TIMES.settle_s
        )

        async def is_theirs() -> bool:
            await redis_client.command("DEL", redis_client.keys.gpu(host_identity(), uuid))
            await theirs.hold(uuid, Hold.CLAIM)
            return (await theirs.hold(uuid, Hold.SETTLE))[0] is Held.SETTLED

        await wait_until(is_theirs, "another one has it")
        with pytest.raises(EngineBroken, match="was given to other"):
            await asyncio.wait_for(running, HANGS_S)
    await theirs.release(uuid)


async def test_a_node_that_finds_no_gpu_says_so_in_a_line_and_loads_nothing(
    redis_client: RedisClient,
) -> None:
    held = (redis_client.settings, host_identity(), "first", gpus(1), ALONE, TIMES)
    first = await asyncio.to_thread(GpuLease.claim, *held)
    module = ("-m", "tests.support.pretended_gpus", "1", "--device", "cuda", "--model", "/no/such/model")
    environ = {**os.environ, "PDQ_REDIS_URL": redis_client.settings.url}
    node = await asyncio.create_subprocess_exec(sys.executable, *module, stderr=PIPE, env=environ)
    try:
        _, said = await asyncio.wait_for(node.communicate(), HANGS_S)
    finally:
        await asyncio.to_thread(first.close)
    assert node.returncode == 1
    (line,) = said.decode().splitlines()
    assert line.startswith("node: no GPU is left: the GPU is held, GPU 0 (Pretended, GPU-0000) by first")


async def test_a_start_that_fails_leaves_its_gpu(redis_client: RedisClient) -> None:
    take = functools.partial(take_gpu, gpus=PretendedGpus(1), times=TIMES)
    settings = NodeSettings(
        engine=replace(ENGINE, model="/no/such/model", device="cuda"),
        redis=redis_client.settings,
        bus=bus_settings(),
    )
    with pytest.raises(ConfigError, match="/no/such/model"):
        await asyncio.to_thread(lambda: Node(settings, make_runner=OnCpu, take_gpu=take))
    assert not await redis_client.command("KEYS", "pdq:gpu:*")
