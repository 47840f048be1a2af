"""What the registry costs: `python -m bench.registry`.

Fifty nodes, each with fifty KV links, and a Redis of our own. Bytes as Redis counts them; times are
medians, of the whole call and of this process' CPU alone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import time
from collections.abc import Awaitable, Callable

from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.registry import NodeRecord, NodeState, Registry, Role
from common.store.server import EmbeddedRedis


def a_node(number: int, nodes: int) -> tuple[NodeRecord, list[dict[str, str]]]:
    record = NodeRecord(
        incarnation=f"decode-host-{number:02}-0123abcd",
        name=f"decode-host-{number:02}",
        role=Role.DECODE,
        state=NodeState.READY,
        endpoint=f"tcp://10.0.0.{number}:45671",
        host=f"host-{number:02}",
        pid=4242,
        cores=16,
        started_at=1_790_000_000_000,
        model="Qwen/Qwen3-8B",
        revision="0" * 40,
        layout="l" * 200,
        numerics="cuda bf16 " * 6,
        tokenizer="f" * 32,
        transports="nccl,nixl,shm,tcp",
        block_size=16,
        slab_bytes=2_359_296,
        num_blocks=30_000,
        max_num_seqs=256,
        max_model_len=40_960,
    )
    links = [
        {
            "link": f"{other:016x}",
            "peer": f"prefill-host-{other:02}-0123abcd",
            "transport": "shm",
            "reason": "same host",
            "direction": "receives",
        }
        for other in range(nodes)
    ]
    return record, links


def beating(record: NodeRecord, beats: int) -> NodeRecord:
    """The record of a node at work: all of its numbers move."""
    return dataclasses.replace(
        record,
        waiting=beats % 7,
        running=100 + beats,
        free_blocks=20_000 + beats,
        leases=beats,
        open_attempts=120 + beats,
        reserved=beats % 5,
        unacknowledged=100 + beats,
        steps=1_000_000 + beats,
        beats=10_000 + beats,
    )


async def measure(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Microseconds of a call: in all, and of CPU."""
    begun, busy = time.perf_counter(), time.process_time()
    await work()
    return 1e6 * (time.perf_counter() - begun), 1e6 * (time.process_time() - busy)


async def counted(client: RedisClient) -> tuple[int, int]:
    (stats,) = await client.pipeline(("INFO", "stats"))
    return int(stats["total_net_input_bytes"]), int(stats["total_net_output_bytes"])


async def run(url: str, nodes: int, rounds: int) -> None:
    client = RedisClient(RedisSettings(url=url))
    await client.open()
    writer, reader = Registry(client), Registry(client)
    all_nodes = [a_node(number, nodes) for number in range(nodes)]
    for record, links in all_nodes:
        await writer.announce(record, links)
    await reader.snapshot()

    before = await counted(client)
    asked = (await counted(client))[0] - before[0], (await counted(client))[1] - before[1]
    print(f"{nodes} nodes with {nodes} KV links each, {rounds} rounds")
    for title, at_work in (("a beat of a node at work", True), ("a beat of an idle node", False)):
        beats: list[tuple[float, float]] = []
        before = await counted(client)
        for number in range(1, rounds + 1):
            for record, links in all_nodes:
                now = beating(record, number if at_work else 0)
                now = dataclasses.replace(now, beats=20_000 + number)
                beats.append(await measure(lambda n=now, k=links: writer.announce(n, k)))  # type: ignore[misc]
        after = await counted(client)
        bytes_ = (after[0] - before[0] - asked[0]) / len(beats)
        whole, busy = (statistics.median(column) for column in zip(*beats, strict=True))
        print(f"{title:32} {bytes_:7.0f} bytes sent  {whole:6.0f} us  {busy:6.0f} us of CPU")
    reads: list[tuple[float, float]] = []
    sent = 0
    for number in range(rounds):
        for record, links in all_nodes:
            await writer.announce(beating(record, 1000 + number), links)
        before = await counted(client)
        reads.append(await measure(reader.snapshot))
        after = await counted(client)
        sent += after[1] - before[1] - asked[1] // 2
    whole, busy = (statistics.median(column) for column in zip(*reads, strict=True))
    title = f"a read of {nodes} nodes at work"
    print(f"{title:32} {sent / rounds:7.0f} bytes heard {whole:6.0f} us  {busy:6.0f} us of CPU")
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    with EmbeddedRedis() as server:
        asyncio.run(run(server.url, arguments.nodes, arguments.rounds))


if __name__ == "__main__":
    main()
