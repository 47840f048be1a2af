"""What a transfer stages: peak memory beyond the pools, half of `python -m bench.handoff`.

A prompt moves once between two fresh processes, whose pools are warm and whose link is open. Each
counts by how much its peak of resident memory exceeds what was resident before, the pools' pages
apart (a reader of `shm` maps the source's). What grows with the prompt is staged KV.
"""

from __future__ import annotations

import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

from bench.transports import HELD, LAYOUT, LINK, OPENERS, SEED, SOURCES, fill, pull
from common.wire.message import HandoffKey
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target
from kv_transfer.transports.shm import ShmReader

PROMPTS = (2048, 8192)  # tokens


class Peak:
    """Of this process, from now on: resident bytes beyond those of now, shared ones apart."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self._before = _bytes("VmRSS") - _bytes("RssShmem")

    def grown(self) -> int:
        return _bytes("VmHWM") - _bytes("RssShmem") - self._before


def _bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, field
    return int(found[1]) * 1024


def serve(pipe: Connection, transport: str, blocks: int) -> None:
    """The source: sends what a reader needs, then what it staged."""
    memory = HostPoolMemory(blocks, LAYOUT.slab_bytes)
    leases = Leases(HELD)
    source = SOURCES[transport](memory, leases)
    fill(memory)
    leases.add(HandoffKey(LINK, "r", 1, 0), range(blocks))
    peak = Peak()
    pipe.send((source.open_link(LINK), [int(n) for n in memory.generations], memory.digests))
    pipe.recv()
    pipe.send(peak.grown())
    source.close()


def read(pipe: Connection, transport: str, blocks: int, offered: Connection) -> None:
    """The receiver."""
    memory = HostPoolMemory(blocks, LAYOUT.slab_bytes)
    proof, generations, digests = offered.recv()
    reader = OPENERS[transport](LINK, proof, Target(memory, LAYOUT))
    pieces = tuple(Piece(b, b, generations[b], b, 0, digests[b], SEED) for b in range(blocks))
    if isinstance(reader, ShmReader):
        reader._mapped._map[::4096]  # every page of the source's pool is resident from here on
    peak = Peak()
    pull(reader, pieces)
    pipe.send(peak.grown())
    offered.send("done")
    reader.close()


def measure_staging() -> dict[str, dict[str, dict[int, int]]]:
    """Bytes by transport, end (`sender`, `receiver`) and tokens of the prompt."""
    return {
        transport: {end: {tokens: grown[tokens][end] for tokens in PROMPTS} for end in ("sender", "receiver")}
        for transport in SOURCES
        for grown in [{tokens: _transfer(transport, tokens) for tokens in PROMPTS}]
    }


def _transfer(transport: str, tokens: int) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    blocks = tokens // LAYOUT.block_size
    to_source, at_source = context.Pipe()
    to_reader, at_reader = context.Pipe()
    processes = [
        context.Process(target=serve, args=(at_source, transport, blocks), daemon=True),
        context.Process(target=read, args=(at_reader, transport, blocks, to_source), daemon=True),
    ]
    for process in processes:
        process.start()
    try:
        receiver = to_reader.recv()
        for process in processes[1:]:
            process.join(20)
        return {"sender": to_source.recv(), "receiver": receiver}
    finally:
        for process in processes:
            process.kill()
            process.join()
