"""Transports against the limits of the same run: half of `python -m bench.handoff`.

The source is another process. All pages are warm, all pieces are slabs of one size, and every
number is the best of several rounds: other load only ever makes them slower. What moves and what
limits take turns, so that both see the same machine.

    memcpy   the same pieces between two warm pools, one `memmove` each       limits shm
    socket   the same pieces over one TCP connection of two processes, with the same copies:
             `sendall` out of the pool, `recv_into` into the pool             limits tcp

`tcp, CURVE` is its encrypted wire, of which nothing is promised; `TLS` is what the bare socket has
with TLS 1.3 on it (bench/tls.py), which a wire with TLS could have at most.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from bench import tls
from common.kv_layout import KVLayout
from common.wire.message import HandoffKey
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory, copy_bytes
from kv_transfer.ports import Piece, TransferSettings
from kv_transfer.transports.base import Opener, Reader, Source, Target
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource

LAYOUT = KVLayout.paged_attention(
    num_layers=24, num_kv_heads=4, head_dim=64, block_size=16, dtype="bfloat16"
)  # 16 positions of 24 KiB
SEED = b"a block's hash.."
LINK = "bench"

KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"  # no secret: both ends are ours

Source_ = Callable[[PoolMemory, Leases], Source]
SOURCES: dict[str, Source_] = {
    "shm": lambda memory, _: ShmSource(memory),
    "tcp": lambda memory, leases: TcpSource(memory, LAYOUT, leases),
    "tcp, CURVE": lambda memory, leases: TcpSource(memory, LAYOUT, leases, secret_key=KEY),
}
OPENERS: dict[str, Opener] = {
    "shm": ShmReader.open,
    "tcp": TcpReader.open,
    "tcp, CURVE": functools.partial(TcpReader.open, secret_key=KEY),
}


class _Held:
    """Blocks that nobody frees."""

    def acquire(self, blocks: Any) -> None: ...

    def release(self, blocks: Any) -> None: ...


HELD = _Held()


def serve(pipe: Connection, blocks: int) -> None:
    """The source's process: a filled, sealed, leased pool; its links, and the bare socket."""
    memory = HostPoolMemory(blocks, LAYOUT.slab_bytes)
    leases = Leases(HELD)
    sources = {name: make(memory, leases) for name, make in SOURCES.items()}
    fill(memory)
    leases.add(HandoffKey(LINK, "r", 1, 0), list(range(blocks)))
    listener = socket.create_server(("127.0.0.1", 0))
    proofs = {name: source.open_link(LINK) for name, source in sources.items()}
    generations = [int(number) for number in memory.generations]
    pipe.send((proofs, generations, memory.digests, listener.getsockname()))
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bare = threading.Thread(target=send_when_asked, args=(connection, memory))
    bare.start()
    send_when_asked(tls.accept(listener), memory)
    bare.join()
    for source in sources.values():
        source.close()


def send_when_asked(connection: socket.socket, memory: HostPoolMemory) -> None:
    with connection:
        while connection.recv(1):
            for block in range(memory.num_blocks):
                connection.sendall(memory.slab(block))


def fill(memory: PoolMemory) -> None:
    """Content and digest for every block."""
    for block in range(memory.num_blocks):
        memory.begin_write(block)
        memory.slabs[block] = block % 251
        memory.seal(block, SEED)


@contextlib.contextmanager
def _source(blocks: int) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, blocks), daemon=True)
    process.start()
    try:
        yield mine.recv()
    finally:
        process.join(10)
        process.kill()
        process.join()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_transports(blocks: int = 128, rounds: int = 7) -> dict[str, Any]:
    """GB/s of each, and the shares of their limits. A prompt of `blocks` slabs per round."""
    own = HostPoolMemory(blocks, LAYOUT.slab_bytes)
    other = HostPoolMemory(blocks, LAYOUT.slab_bytes)
    target = Target(own, LAYOUT)
    slab = LAYOUT.slab_bytes
    with _source(blocks) as (proofs, generations, digests, address):
        bare = _Bare(socket.create_connection(address), own)
        encrypted = _Bare(tls.Reader(socket.create_connection(address)), own)
        readers = {name: opener(LINK, proofs[name], target) for name, opener in OPENERS.items()}
        plain = tuple(Piece(b, b, generations[b], b, 0, b"", SEED) for b in range(blocks))
        checked = tuple(Piece(b, b, generations[b], b, 0, digests[b], SEED) for b in range(blocks))

        def memcpy() -> None:
            for block in range(blocks):
                copy_bytes(own.address(block), other.address(block), slab)

        def digest() -> None:
            for piece in checked:
                target.check(piece)

        runs: dict[str, Callable[[], object]] = {"memcpy": memcpy, "socket": bare.pull}
        runs["socket, TLS"] = encrypted.pull
        for name, reader in readers.items():
            runs[name] = functools.partial(pull, reader, plain)
            runs[f"{name}, digest"] = functools.partial(pull, reader, checked)
        tries: dict[str, list[float]] = {name: [] for name in (*runs, "digest alone")}
        for turn in range(rounds + 1):  # the first warms up
            # In another order each time: what ran just before decides what is in cache.
            for name in random.Random(turn).sample(list(runs), len(runs)):
                tries[name].append(_seconds(runs[name]))
                if name == "shm, digest":  # now the content is what the pieces promise
                    tries["digest alone"].append(_seconds(digest))
        for reader in readers.values():
            reader.close()
        bare.close()
        encrypted.close()
    volume = blocks * slab
    rates = {name: volume / min(seconds[1:]) / 1e9 for name, seconds in tries.items()}
    medians = {name: volume / statistics.median(s[1:]) / 1e9 for name, s in tries.items()}
    shares = {
        f"{name} / {limit}": statistics.median(
            b / a for a, b in zip(tries[name][1:], tries[limit][1:], strict=True)
        )
        for name, limit in (
            ("shm", "memcpy"),
            ("shm, digest", "memcpy"),
            ("tcp", "socket"),
            ("tcp, digest", "socket"),
            ("socket, TLS", "socket"),
            ("tcp, CURVE", "socket"),
        )
    }
    best = {name: rates[name.split(" / ")[0]] / rates[name.split(" / ")[1]] for name in shares}
    own.close()
    other.close()
    return {
        "slab_bytes": slab,
        "blocks": blocks,
        "rounds": rounds,
        "best_gb_per_s": rates,
        "median_gb_per_s": medians,
        "share_best": best,
        "share_median": shares,
    }


def pull(reader: Reader, pieces: tuple[Piece, ...]) -> None:
    """As the driver does."""
    at_once = TransferSettings().copy_blocks
    for start in range(0, len(pieces), at_once):
        reader.pull(pieces[start : start + at_once])


class _Bare:
    """The reading end of the bare socket, which may have TLS on it."""

    def __init__(self, connection: socket.socket | tls.Reader, pool: HostPoolMemory) -> None:
        self._socket, self._pool = connection, pool

    def pull(self) -> None:
        self._socket.send(b"x")
        for block in range(self._pool.num_blocks):
            left = self._pool.slab(block)
            while left:
                left = left[self._socket.recv_into(left) :]

    def close(self) -> None:
        self._socket.close()
