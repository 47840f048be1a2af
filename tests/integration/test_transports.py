"""One contract for every transport: what kv_transfer/transports/base.py promises, with real memory.

A transport with a size behind it, as `tcp:24`, is one whose reader has blocks of that many positions:
what is copied is converted (transports/converting.py), and all that the contract promises still holds.

`source_process` is another process that owns a pool and serves it, so that it can be killed and
stopped; everything else runs in this one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, DigestMismatch, LinkLost, MalformedMessage, StaleBlock
from common.kv_layout import KVLayout
from common.wire.bus import new_secret_key
from common.wire.message import HandoffKey
from common.wire.messages import Proved, Slabs
from kv_transfer.cuda import Pinned
from kv_transfer.device_memory import STAGED_BYTES, DevicePoolMemory
from kv_transfer.digests import slab_digest, tail_seed
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import Piece, Span
from kv_transfer.transports.base import Reader, Source, Target
from kv_transfer.transports.converting import SCRATCH_BYTES, ConvertingReader
from kv_transfer.transports.cuda_ipc import CudaIpcReader, CudaIpcSource
from kv_transfer.transports.nccl import NcclReader, NcclSource, Turns
from kv_transfer.transports.nixl import NixlReader, NixlSource
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource, slots_per_pull, split_proof
from kv_transfer.transports.tcp_frames import ReceivingFrames
from tests.support.fake_cuda import FakeCuda, FakeStream
from tests.support.fake_nccl import FakeNccl, FakePair
from tests.support.holdings import shared_files
from tests.support.redis import HANGS_S

LAYOUT = KVLayout.paged_attention(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
SCALED = (
    KVLayout.paged_attention(  # in 8 bits, with scales of 6 bytes a position, which end between two slabs
        num_layers=3, num_kv_heads=3, head_dim=8, block_size=5, dtype="float8_e4m3fn"
    )
)
LARGE = KVLayout.paged_attention(num_layers=8, num_kv_heads=8, head_dim=64, block_size=16, dtype="float32")
KEY = HandoffKey("link", "request", 1, 0)
SEED = b"the block's hash"
KEY_PAIR = new_secret_key()
NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None, reason="nixl is not installed (pip install pdq[nixl])"
    ),
)
FOLDER = tempfile.TemporaryDirectory(prefix="pdq-shm-")  # where sockets of "shm+folder" lie


class CountingPool:
    """References per block, as a block pool counts them."""

    def __init__(self) -> None:
        self.references: dict[int, int] = {}

    def acquire(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] = self.references.get(block, 0) + 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1


@dataclasses.dataclass
class End:
    """Both ends of one link in this process, of one transport."""

    source: Source
    memory: PoolMemory
    leases: Leases
    pool: CountingPool
    layout: KVLayout  # of the source, without its draft model where that is not copied
    target: Target
    open: Callable[[str], Reader]
    readers: list[Reader] = dataclasses.field(default_factory=list)

    def fill(self, block: int, seed: bytes = SEED) -> None:
        self.memory.begin_write(block)
        content = torch.randint(0, 256, (self.memory.slab_bytes,)).to(torch.uint8)
        content[between_segments(self.layout)] = 0
        self.memory.slabs[block] = content
        self.memory.seal(block, seed, self.layout.without_draft.ranges())

    def piece(self, slot: int, block: int, seed: bytes = SEED, index: int = 0) -> Piece:
        """Into `block`, where the source's blocks would lie one after the other in the target."""
        generation, digest = int(self.memory.generations[slot]), self.memory.digests[slot]
        where = places(self.target, self.layout, block)
        return Piece(index, slot, generation, block, 0, digest, seed, where)

    def got(self, block: int) -> torch.Tensor:
        return arrived(self.target, self.layout, block)

    def same(self, slot: int, block: int) -> bool:
        return torch.equal(self.memory.slabs[slot], self.got(block))

    def all_same(self) -> bool:
        return all(self.same(block, block) for block in range(self.memory.num_blocks))

    def reader(self, link: str = "link") -> Reader:
        self.readers.append(self.open(link))
        return self.readers[-1]


def between_segments(layout: KVLayout) -> torch.Tensor:
    """Which bytes of a slab belong to no segment, of the slabs of `layout` and of any that begin with it."""
    found = torch.ones(layout.slab_bytes, dtype=torch.bool)
    for segment in layout.segments:
        found[segment.offset : segment.offset + segment.num_bytes] = False
    return found.nonzero().flatten()


def places(target: Target, layout: KVLayout, block: int) -> tuple[Span, ...]:
    """Position by position, where block `block` of `layout` goes in a target that converts."""
    if target.layout == layout:
        return ()
    positions = range(block * layout.block_size, (block + 1) * layout.block_size)
    ours = target.layout.block_size
    return tuple(Span(p // ours, p % ours, p - positions[0], 1) for p in positions)


def arrived(target: Target, layout: KVLayout, block: int) -> torch.Tensor:
    """What lies in the target, as the slab of `layout` that it came from."""
    if target.layout == layout:
        return target.memory.slabs[block]
    slab = torch.zeros(layout.slab_bytes, dtype=torch.uint8)
    for place in places(target, layout, block):
        for theirs, ours in zip(layout.segments, target.layout.segments, strict=True):
            row = theirs.num_bytes // layout.block_size
            source = ours.offset + place.at * row
            into = theirs.offset + place.start * row
            slab[into : into + row] = target.memory.slabs[place.block][source : source + row]
    return slab


def target_for(transport: str, layout: KVLayout, blocks: int) -> Target:
    """Room for as many positions, in blocks of the size behind the transport's name."""
    base, _, size = transport.partition(":")
    ours = layout.with_block_size(int(size or layout.block_size))
    count = -(-blocks * layout.block_size // ours.block_size)
    return Target(pool_memory(base, count, ours.slab_bytes), ours)


def opener(transport: str, layout: KVLayout) -> Callable[[str, bytes, Target], Reader]:
    base, _, size = transport.partition(":")
    if size:
        plain = opener(base, layout)
        return lambda *a: ConvertingReader.open(plain, *a, layout.block_size)
    return {
        "shm": ShmReader.open,
        "shm+folder": lambda *a: ShmReader.open(*a, folder=FOLDER.name),
        "tcp": TcpReader.open,
        "tcp+curve": lambda *a: TcpReader.open(*a, secret_key=KEY_PAIR),
        "tcp+staged": TcpReader.open,
        "tcp+curve+staged": lambda *a: TcpReader.open(*a, secret_key=KEY_PAIR),
        "nixl": NixlReader.open,
        "cuda_ipc": lambda *a: CudaIpcReader.open(*a, cuda=CUDA),
        "nccl": lambda *a: NcclReader.connect(*a, CUDA, NCCL, READER_TURNS),
    }[transport]


# A device that is not there: what runs here is everything but the calls of CUDA and NCCL.
CUDA = FakeCuda()
NCCL = FakeNccl(CUDA)
READER_TURNS = Turns()
ON_DEVICE = ("tcp+staged", "tcp+curve+staged", "cuda_ipc", "nccl")


def pool_memory(transport: str, blocks: int, slab_bytes: int) -> PoolMemory:
    if transport in ON_DEVICE:
        return DevicePoolMemory(blocks, slab_bytes, CUDA)
    return HostPoolMemory(blocks, slab_bytes)


def make_source(transport: str, memory: PoolMemory, layout: KVLayout, leases: Leases) -> Source:
    if transport.startswith("shm"):
        return ShmSource(memory, FOLDER.name if transport == "shm+folder" else "")
    if transport == "nixl":
        return NixlSource(memory)
    if transport == "cuda_ipc":
        assert isinstance(memory, DevicePoolMemory)
        return CudaIpcSource(memory)
    if transport == "nccl":
        return NcclSource(memory, layout, leases, CUDA, NCCL, Turns())
    return TcpSource(memory, layout, leases, secret_key=key_of(transport))


def key_of(transport: str) -> str:
    return KEY_PAIR if "curve" in transport else ""


@contextlib.contextmanager
def both_ends(
    transport: str, layout: KVLayout = LAYOUT, blocks: int = 8, *, draft: KVLayout | None = None
) -> Iterator[End]:
    """`draft`: the target's layout, where the ends have different draft models."""
    pool = CountingPool()
    leases = Leases(pool)
    base = transport.partition(":")[0]
    memory = pool_memory(base, blocks, layout.slab_bytes)
    target = target_for(transport, draft or layout, blocks)
    source = make_source(base, memory, layout, leases)
    if draft is not None:
        target, layout = target.without_draft(layout.slab_bytes), layout.without_draft
    open_reader = opener(transport, layout)
    end = End(
        source,
        memory,
        leases,
        pool,
        layout,
        target,
        lambda link: open_reader(link, source.open_link(link), target),
    )
    try:
        yield end
    finally:
        for reader in end.readers:
            reader.close()
        source.close()
        memory.close()
        target.memory.close()


def descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {name for name in found if "memfd" in name or "eventfd" in name or "socket" in name}


def wait_until(condition: Callable[[], object], what: str, seconds: float = HANGS_S) -> None:
    """Look again until it holds; only for what another thread or process does."""
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        tick.wait(0.002)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before, shared = descriptors(), shared_files()
    threads = threading.active_count()
    yield
    gc.collect()
    wait_until(lambda: descriptors() <= before, "descriptors back to the baseline")
    wait_until(lambda: threading.active_count() <= threads, "threads back to the baseline")
    assert shared_files() <= shared
    assert os.listdir(FOLDER.name) == []
    assert (CUDA.left, NCCL.left) == (0, 0)
    assert CUDA.faults == []


NIXL_TO_24 = pytest.param("nixl:24", marks=NIXL.marks)
with_digests = ["shm", "shm+folder", "tcp", "tcp+curve", NIXL, "shm:3", "tcp:24", "tcp+curve:2", NIXL_TO_24]
converting_on_device = ["tcp+staged:1", "cuda_ipc:12", "nccl:3"]
every_transport = pytest.mark.parametrize("transport", [*with_digests, *ON_DEVICE, *converting_on_device])
every_with_digests = pytest.mark.parametrize("transport", with_digests)


every_layout = pytest.mark.parametrize("layout", [LAYOUT, SCALED], ids=["float32", "fp8"])


@every_transport
@every_layout
def test_pulled_blocks_are_equal_byte_for_byte(transport: str, layout: KVLayout) -> None:
    with both_ends(transport, layout) as end:
        for block in range(8):
            end.fill(block)
        end.leases.add(KEY, list(range(8)))
        end.reader().pull([end.piece(slot, 7 - slot, index=slot) for slot in range(8)])
        assert all(end.same(slot, 7 - slot) for slot in range(8))


@every_transport
def test_a_link_opens_before_anything_is_leased(transport: str) -> None:
    with both_ends(transport) as end:
        reader = end.reader()
        end.fill(0)
        end.leases.add(KEY, [0])
        reader.pull([end.piece(0, 1)])
        assert end.same(0, 1)


@every_transport
def test_a_prompt_much_larger_than_the_window_arrives_whole(transport: str) -> None:
    with both_ends(transport, LARGE, blocks=48) as end:
        assert 48 * LARGE.slab_bytes >= 24 << 20
        for block in range(48):
            end.fill(block)
        end.leases.add(KEY, list(range(48)))
        end.reader().pull([end.piece(b, b, index=b) for b in range(48)])
        assert end.all_same()


@every_transport
@every_layout
@pytest.mark.parametrize("fill", [1, 3])
def test_of_a_tail_only_the_filled_positions_are_copied(transport: str, layout: KVLayout, fill: int) -> None:
    seed = tail_seed(b"parent", range(fill))
    with both_ends(transport, layout) as end:
        end.fill(2)
        end.memory.seal(2, seed, layout.ranges(fill))
        end.leases.add(KEY, [2])
        end.target.memory.slabs[:] = 77
        whole = end.piece(2, 5, seed)
        end.reader().pull([dataclasses.replace(whole, fill=fill, spans=whole.spans[:fill])])
        filled = torch.zeros(layout.slab_bytes, dtype=torch.bool)
        for offset, length in layout.ranges(fill):
            filled[offset : offset + length] = True
        assert torch.equal(end.got(5)[filled], end.memory.slabs[2][filled])
        filled[between_segments(layout)] = True
        assert (end.got(5)[~filled] == 77).all()
        assert int((end.target.memory.slabs != 77).sum()) <= int(filled.sum()), "nowhere else"


DRAFT = KVLayout.paged_attention(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
OTHER_DRAFT = KVLayout.paged_attention(
    num_layers=2, num_kv_heads=1, head_dim=32, block_size=4, dtype="bfloat16"
)
SCALED_DRAFT = KVLayout.paged_attention(
    num_layers=1, num_kv_heads=1, head_dim=4, block_size=5, dtype="float8_e5m2"
)
different_drafts = pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (LAYOUT, LAYOUT.with_draft(DRAFT)),
        (LAYOUT.with_draft(OTHER_DRAFT), LAYOUT),
        (LAYOUT.with_draft(DRAFT), LAYOUT.with_draft(OTHER_DRAFT)),
        (LAYOUT.with_draft(DRAFT), LAYOUT.with_draft(DRAFT)),  # another one of the same shape
        (SCALED.with_draft(SCALED_DRAFT), SCALED.with_draft(DRAFT.with_block_size(5))),
    ],
    ids=["ours", "theirs", "both", "alike", "of another type"],
)


@every_transport
@different_drafts
def test_where_draft_models_differ_the_models_own_kv_is_copied_and_no_more(
    transport: str, theirs: KVLayout, mine: KVLayout
) -> None:
    with both_ends(transport, theirs, draft=mine) as end:
        end.target.memory.slabs[:] = 77
        for block in range(8):
            end.fill(block)
        end.memory.seal(7, SEED, theirs.without_draft.ranges(3))
        end.leases.add(KEY, list(range(8)))
        whole = [end.piece(slot, 7 - slot, index=slot) for slot in range(8)]
        tail = dataclasses.replace(whole[7], fill=3, spans=whole[7].spans[:3])
        end.reader().pull([*whole[:7], tail])
        num_copied = 0
        for piece in (*whole[:7], tail):
            for offset, length in theirs.without_draft.ranges(piece.fill):
                sent = end.memory.slabs[piece.slot][offset : offset + length]
                assert torch.equal(end.got(7 - piece.slot)[offset : offset + length], sent)
                num_copied += length
        assert int((end.target.memory.slabs != 77).sum()) <= num_copied, "nowhere else"
        assert (end.target.memory.slabs[:, end.target.layout.slab_bytes :] == 77).all()


@every_transport
def test_a_block_that_was_rewritten_since_it_was_announced_is_stale(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(1)
        end.leases.add(KEY, [1])
        piece = end.piece(1, 0)
        end.fill(1)
        with pytest.raises(StaleBlock):
            end.reader().pull([piece])


@every_transport
def test_a_block_that_is_being_written_is_stale(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(1)
        end.leases.add(KEY, [1])
        end.memory.begin_write(1)
        with pytest.raises(StaleBlock):
            end.reader().pull([end.piece(1, 0)])


@every_transport
def test_a_generation_that_changes_between_both_looks_is_stale(transport: str) -> None:
    """The second look is what makes it a proof: the first one alone would pass here."""
    with both_ends(transport) as end:
        end.fill(1)
        end.leases.add(KEY, [1])
        piece = dataclasses.replace(end.piece(1, 0), digest=b"")
        looks = RewriteAfterFirstLook(end.memory.generations, lambda: end.fill(1))
        reader = outer = end.reader()
        if isinstance(reader, ConvertingReader):
            reader = reader._reader
        if isinstance(reader, (ShmReader, CudaIpcReader)):
            reader._mapped.generations = looks  # type: ignore[assignment]
        elif isinstance(reader, NixlReader):  # it looks from afar
            reader._read = RewriteAfterFirstRead(reader._read, lambda: end.fill(1))  # type: ignore[method-assign]
        else:
            end.memory.generations = looks  # type: ignore[assignment]
        with pytest.raises(StaleBlock):
            outer.pull([piece])
        del looks


class RewriteAfterFirstLook:
    """A generation array that is looked at once, and then rewritten by `rewrite`."""

    def __init__(self, generations: object, rewrite: Callable[[], None]) -> None:
        self.generations, self.rewrite, self.busy, self.looks = generations, rewrite, False, 0

    def __getitem__(self, block: int) -> object:
        value = copy.copy(self.generations[block])  # type: ignore[index]
        if not self.busy:
            self.looks += 1
            if self.looks == 1:
                self.busy = True
                self.rewrite()
                self.busy = False
        return value

    def __setitem__(self, block: int, value: int) -> None:
        self.generations[block] = value  # type: ignore[index]


class RewriteAfterFirstRead:
    """A read of the source's memory, after the first of which `rewrite` happens there."""

    def __init__(self, read: Callable[..., None], rewrite: Callable[[], None]) -> None:
        self.read, self.rewrite, self.reads = read, rewrite, 0

    def __call__(self, *arguments: object) -> None:
        self.read(*arguments)
        self.reads += 1
        if self.reads == 1:
            self.rewrite()


@every_with_digests
def test_corrupted_bytes_do_not_pass_the_digest(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(3)
        end.memory.slabs[3][17] ^= 1
        end.leases.add(KEY, [3])
        with pytest.raises(DigestMismatch):
            end.reader().pull([end.piece(3, 0)])


@every_with_digests
def test_equal_bytes_under_another_hash_do_not_pass_the_digest(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(3, seed=b"another's   hash")
        end.leases.add(KEY, [3])
        with pytest.raises(DigestMismatch):
            end.reader().pull([end.piece(3, 0, seed=SEED)])


@every_transport
def test_a_link_goes_on_after_a_pull_that_failed(transport: str) -> None:
    with both_ends(transport) as end:
        for block in range(8):
            end.fill(block)
        end.leases.add(KEY, list(range(8)))
        reader = end.reader()
        pieces = [end.piece(b, b, index=b) for b in range(8)]
        stale = dataclasses.replace(pieces[2], generation=pieces[2].generation + 2)
        with pytest.raises(StaleBlock):
            reader.pull([*pieces[:2], stale, *pieces[3:]])
        if transport.partition(":")[0] not in ON_DEVICE:
            end.memory.slabs[2][0] ^= 1
            with pytest.raises(DigestMismatch):
                reader.pull(pieces)
            end.memory.slabs[2][0] ^= 1
        reader.pull(pieces)
        assert end.all_same()


@every_transport
@pytest.mark.parametrize("slot", [-1, 8, 2**40])
def test_a_place_that_does_not_exist_is_an_error(transport: str, slot: int) -> None:
    with both_ends(transport) as end:
        piece = Piece(0, slot, 0, 0, 0, b"", SEED)
        with pytest.raises((MalformedMessage, StaleBlock)):
            end.reader().pull([piece])


@every_transport
def test_a_closed_link_serves_no_new_reader(transport: str) -> None:
    with both_ends(transport) as end:
        proof = end.source.open_link("gone")
        end.source.close_link("gone")
        with pytest.raises(LinkLost):
            opener(transport, LAYOUT)("gone", proof, end.target)


@every_transport
def test_a_proof_that_is_wrong_opens_nothing(transport: str) -> None:
    with both_ends(transport) as end:
        proof = bytearray(end.source.open_link("link"))
        by_socket = transport.startswith(("shm", "cuda_ipc"))
        proof[16 if by_socket or transport.startswith("nixl") else 0] ^= 1
        if by_socket:
            proof[-1] ^= 1
        with pytest.raises((LinkLost, MalformedMessage)), short_open_timeout():
            opener(transport, LAYOUT)("link", bytes(proof), end.target)
        for nonsense in (b"", b"x", b"\xff" * 60):
            with pytest.raises((LinkLost, MalformedMessage)):
                opener(transport, LAYOUT)("link", nonsense, end.target)


@contextlib.contextmanager
def short_open_timeout() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TcpReader, "open_timeout_s", 0.2)
        yield


@every_transport
def test_a_pull_on_a_closed_reader_is_a_lost_link(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        reader = end.reader()
        reader.close()
        reader.close()
        with pytest.raises(LinkLost):
            reader.pull([end.piece(0, 0)])


# What each transport promises besides


tcp_wires = pytest.mark.parametrize("transport", ["tcp", "tcp+curve"])


@tcp_wires
def test_tcp_serves_only_blocks_that_are_leased_to_the_link(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(HandoffKey("another link", "r", 1, 0), [0])
        with pytest.raises(StaleBlock):
            end.reader().pull([end.piece(0, 0)])


@tcp_wires
def test_tcp_keeps_references_until_the_bytes_have_left(transport: str) -> None:
    """The lease ends while a reader takes nothing: the blocks stay until the link is torn down."""
    with both_ends(transport, LARGE, blocks=64) as end:
        for block in range(64):
            end.fill(block)
        end.leases.add(KEY, list(range(64)))
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        at_once = min(32, slots_per_pull(reader._wire, end.memory.slab_bytes))
        for start in range(0, 64, at_once):  # more than the sockets hold, and reads nothing
            reader._request(tuple(end.piece(b, b) for b in range(start, start + at_once)))
        wait_until(unchanged(lambda: dict(end.leases._touched)), "the source waits for its reader")
        end.leases.end(KEY)
        assert end.leases.count()["ending"] == 1
        assert end.pool.references[31] == 1
        end.source.close_link("link")
        end.leases.collect()
        assert end.leases.count() == {"open": 0, "ending": 0, "touched": 0}
        assert set(end.pool.references.values()) == {0}


def unchanged(look: Callable[[], object], seconds: float = 0.3) -> Callable[[], bool]:
    """Whether what `look` finds is something, and has been the same for so long."""
    last, since = None, 0.0

    def condition() -> bool:
        nonlocal last, since
        found, now = copy.deepcopy(look()), time.monotonic()
        if not found or found != last:
            last, since = found, now
        return bool(found) and now - since >= seconds

    return condition


@tcp_wires
def test_tcp_refuses_a_pull_that_no_reader_of_ours_sends(transport: str) -> None:
    """What one pull asks for is held in memory on its way."""
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        most = slots_per_pull(reader._wire, end.memory.slab_bytes)
        number = reader._request((end.piece(0, 0),) * (most + 1))
        assert reader._receive(10.0) == Slabs("link", number, "too_many")


@tcp_wires
def test_tcp_gives_references_back_as_soon_as_a_pull_is_proved(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        end.reader().pull([end.piece(0, 0)])
        assert end.leases.count()["touched"] == 0


@tcp_wires
def test_tcp_lets_go_of_every_block_of_a_pull_that_failed(transport: str) -> None:
    """Also of those that were on their way when a block of an earlier request was wrong."""
    with both_ends(transport, LARGE, blocks=32) as end:
        for block in range(32):
            end.fill(block)
        end.memory.slabs[0][17] ^= 1
        end.leases.add(KEY, list(range(32)))
        reader = end.reader()
        with pytest.raises(DigestMismatch):
            reader.pull([end.piece(b, b, index=b) for b in range(32)])
        wait_until(lambda: end.leases.count()["touched"] == 0, "the source lets go")
        end.leases.end(KEY)
        assert set(end.pool.references.values()) == {0}


@tcp_wires
def test_tcp_lets_go_of_a_block_when_its_bytes_have_left_the_pool(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(0)
        sent = end.memory.slabs[0].clone()
        end.leases.add(KEY, [0])
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        piece = end.piece(0, 0)
        number = reader._request((piece,))
        assert reader._receive(10.0) == Slabs("link", number, "")
        wait_until(lambda: end.leases.count()["touched"] == 0, "they have left")
        end.fill(0)
        assert reader._receive_slabs((piece,)) is None
        assert torch.equal(end.target.memory.slabs[0], sent)
        assert reader._receive(10.0) == Proved("link", number, unchanged=True)


def test_a_stream_hears_the_reader_behind_strangers_who_say_nothing() -> None:
    """More of them than are heard out at once; one who says another token, and one who hangs up."""
    with both_ends("tcp") as end, contextlib.ExitStack() as strangers:
        proof = end.source.open_link("link")
        _, _, host, port = split_proof(proof)
        calls = [strangers.enter_context(socket.create_connection((host, port))) for _ in range(12)]
        calls[-1].sendall(bytes(16))
        calls[-2].close()
        end.fill(0)
        end.leases.add(KEY, [0])
        reader = TcpReader.open("link", proof, end.target)
        reader.pull([end.piece(0, 1)])
        reader.close()
        assert end.same(0, 1)
        for call in calls[:-2]:
            call.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert call.recv(1) == b"", "nobody else is heard any more"


@pytest.mark.parametrize("encrypts", [False, True])
def test_plain_text_is_taken_only_where_both_ends_say_so(encrypts: bool) -> None:
    memory, leases = HostPoolMemory(1, LAYOUT.slab_bytes), Leases(CountingPool())
    source = TcpSource(memory, LAYOUT, leases, secret_key=KEY_PAIR, encrypts=False)
    target = Target(memory, LAYOUT)
    try:
        proof = source.open_link("link")
        assert proof[16:].startswith(b"tcp://")
        if encrypts:
            with pytest.raises(LinkLost, match="plain text"):
                TcpReader.open("link", proof, target, secret_key=KEY_PAIR)
        else:
            TcpReader.open("link", proof, target, secret_key=KEY_PAIR, encrypts=False).close()
    finally:
        source.close()
        memory.close()


def test_shm_cannot_be_mapped_for_writing_and_cannot_shrink() -> None:
    import mmap

    memory = HostPoolMemory(2, 4096)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fd, 4096)
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)
    finally:
        memory.close()


def test_a_file_that_is_no_sealed_pool_is_not_mapped() -> None:
    from kv_transfer.generations import MappedGenerations

    fd = os.memfd_create("loose")
    os.ftruncate(fd, 8192)
    try:
        with pytest.raises(MalformedMessage):
            MappedGenerations(fd)
    finally:
        os.close(fd)


# Links that convert


@pytest.mark.parametrize("transport", ["shm:3", "tcp:24", "cuda_ipc:12"])
def test_what_is_not_proven_reaches_no_block_of_ours(transport: str) -> None:
    """The sender's slab is checked as a whole, in scratch memory, before a position is copied on."""
    with both_ends(transport) as end:
        for block in range(8):
            end.fill(block)
        end.leases.add(KEY, list(range(8)))
        end.target.memory.slabs[:] = 77
        pieces = [end.piece(b, b, index=b) for b in range(8)]
        pieces[7] = dataclasses.replace(pieces[7], generation=pieces[7].generation + 2)
        reader = end.reader()
        with pytest.raises(StaleBlock):
            reader.pull(pieces)
        if transport != "cuda_ipc:12":
            end.memory.slabs[0][5] ^= 1
            with pytest.raises(DigestMismatch):
                reader.pull(pieces[:7])
        assert (end.target.memory.slabs == 77).all()


@pytest.mark.parametrize("size", [1, 48, 64])
def test_scratch_memory_is_bounded_whatever_the_prompt(size: int) -> None:
    with both_ends(f"shm:{size}", LARGE, blocks=48) as end:
        for block in range(48):
            end.fill(block)
        reader = end.reader()
        assert isinstance(reader, ConvertingReader)
        scratch = reader._scratch.memory
        assert 0 < scratch.num_blocks * scratch.slab_bytes <= SCRATCH_BYTES
        assert 48 * LARGE.slab_bytes > SCRATCH_BYTES
        reader.pull([end.piece(b, b, index=b) for b in range(48)])
        assert end.all_same()


def test_a_block_larger_than_the_bound_has_one_scratch_slab() -> None:
    huge = LARGE.with_block_size(1024)
    assert huge.slab_bytes > SCRATCH_BYTES
    with both_ends("shm:16", huge, blocks=2) as end:
        end.fill(1)
        reader = end.reader()
        assert isinstance(reader, ConvertingReader)
        assert reader._scratch.memory.num_blocks == 1
        reader.pull([dataclasses.replace(end.piece(1, 0), spans=(Span(3, 5, 1000, 11),))])
        view = end.target.memory.slabs[3].view(torch.float32).view(16, 16, 8 * 64)
        sent = end.memory.slabs[1].view(torch.float32).view(16, 1024, 8 * 64)
        assert torch.equal(view[:, 5:].view(torch.int32), sent[:, 1000:1011].view(torch.int32))
        assert not view[:, :5].any()


# What devices need: all but the calls of CUDA and NCCL themselves


def test_cuda_ipc_looks_again_only_after_its_copies_have_ended() -> None:
    """The fake device copies when it is waited for: a look before that would prove nothing."""
    with both_ends("cuda_ipc") as end:
        end.fill(1)
        piece = end.piece(1, 0)
        reader = end.reader()
        order: list[str] = []
        wait, mapped = FakeStream.synchronize, reader._mapped  # type: ignore[attr-defined]

        class Looks:
            def __getitem__(self, blocks: object) -> object:
                order.append("look")
                return end.memory.generations[blocks]  # type: ignore[index]

        def synchronize(stream: FakeStream) -> None:
            order.append("synchronize")
            wait(stream)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeStream, "synchronize", synchronize)
            patch.setattr(mapped, "generations", Looks())
            reader.pull([piece])
        assert order == ["look", "synchronize", "look"]
        assert end.same(1, 0)
        mapped.generations = end.memory.generations


@pytest.mark.parametrize("transport", ON_DEVICE)
def test_a_digest_that_was_promised_is_checked_on_a_copy_in_host_memory(transport: str) -> None:
    with both_ends(transport) as end:
        end.fill(1)
        end.leases.add(KEY, [1])
        right = slab_digest(memoryview(end.memory.slabs[1].numpy()), SEED)
        reader = end.reader()
        assert end.piece(1, 0).digest == b"", "a device pool computes none itself"
        reader.pull([dataclasses.replace(end.piece(1, 0), digest=right)])
        with pytest.raises(DigestMismatch):
            reader.pull([dataclasses.replace(end.piece(1, 0), digest=bytes(16))])


staged = pytest.mark.parametrize("transport", ["tcp+staged", "tcp+curve+staged"])


@staged
def test_staging_is_bounded_whatever_the_prompt_and_given_back(transport: str) -> None:
    with both_ends(transport, LARGE, blocks=48) as end:
        lent: dict[int, int] = {}
        most, pinned, give = 0, CUDA.pinned, CUDA.give_pinned

        def counted(length: int) -> Pinned:
            nonlocal most
            made = pinned(length)
            lent[made.address] = length
            most = max(most, sum(lent.values()))
            return made

        def given(pinned: Pinned) -> None:
            del lent[pinned.address]
            give(pinned)

        for block in range(48):
            end.fill(block)
        end.leases.add(KEY, list(range(48)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CUDA, "pinned", counted)
            patch.setattr(CUDA, "give_pinned", given)
            end.reader().pull([end.piece(b, b, index=b) for b in range(48)])
            wait_until(lambda: not lent, "nothing is staged")
        assert LARGE.slab_bytes <= most <= 2 * STAGED_BYTES, "the source's and the reader's"
        assert 48 * LARGE.slab_bytes > 2 * STAGED_BYTES


@staged
def test_nothing_that_is_staged_is_overwritten_before_it_has_left(transport: str) -> None:
    """More is asked for than the ring holds, faster than it is taken."""
    with both_ends(transport, LARGE, blocks=48) as end:
        for block in range(48):
            end.fill(block)
        end.leases.add(KEY, list(range(48)))
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TcpReader, "_window", lambda self: 64)
            reader.pull([end.piece(b, b, index=b) for b in range(48)])
        assert torch.equal(end.memory.slabs, end.target.memory.slabs)
        assert end.leases.count()["touched"] == 0


def test_nccl_with_a_peer_that_never_comes_is_aborted() -> None:
    from kv_transfer.transports.nccl import Channel, NcclReader

    with both_ends("nccl") as end, pytest.MonkeyPatch.context() as patch:
        for kind in (Channel, NcclReader):
            patch.setattr(kind, "setup_timeout_s", 0.2)
        patch.setattr(NCCL, "peer_comes", False)
        with pytest.raises(LinkLost, match="does not answer"):
            end.reader()
        wait_until(lambda: NCCL.left == 0, "both communicators are aborted")


def test_nccl_aborts_before_a_failed_pull_lets_its_blocks_go() -> None:
    """The source says that it sends, and does not: the receive waits on the device."""
    with both_ends("nccl") as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        reader, errors = end.reader(), []
        before = NCCL.left
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakePair, "exchange", lend_only_receives(FakePair.exchange))

            def pull() -> None:
                try:
                    reader.pull([end.piece(0, 1)])
                except LinkLost as error:
                    errors.append((error, NCCL.left))

            thread = threading.Thread(target=pull)
            thread.start()
            wait_until(lambda: CUDA.is_busy, "the receive is on the device")
            reader.close()
            thread.join(20)
        assert len(errors) == 1
        assert errors[0][1] < before, "aborted before the error was reported"


def lend_only_receives(exchange: Callable[..., None]) -> Callable[..., None]:
    def only(self: FakePair, ranges: object, stream: int, *, send: bool) -> None:
        if not send:
            exchange(self, ranges, stream, send=send)

    return only


def test_nccl_links_that_cross_do_not_wait_for_each_other() -> None:
    """Two nodes that send to each other, and both to and from a third: every pull ends."""
    turns = {name: Turns() for name in "abc"}
    layout, blocks = LAYOUT, 8
    with contextlib.ExitStack() as stack:
        memories = {}
        sources = {}
        for name in "abc":
            memory = DevicePoolMemory(blocks, layout.slab_bytes, CUDA)
            stack.callback(memory.close)
            leases = Leases(CountingPool())
            for block in range(4):
                memory.slabs[block] = 10 * ord(name) % 251 + block
                memory.seal(block)
            memories[name] = memory
            sources[name] = NcclSource(memory, layout, leases, CUDA, NCCL, turns[name])
            stack.callback(sources[name].close)
            for other in "abc":
                leases.add(HandoffKey(other, "r", 1, 0), [0, 1, 2, 3])
        errors: list[Exception] = []
        threads = []
        for sender in "abc":
            for receiver in "abc".replace(sender, ""):
                target = Target(memories[receiver], layout)
                reader = NcclReader.connect(
                    receiver, sources[sender].open_link(receiver), target, CUDA, NCCL, turns[receiver]
                )
                stack.callback(reader.close)
                into = 4 + 2 * "abc".replace(receiver, "").index(sender)
                pieces = [Piece(i, i, 0, into + i, 0, b"", SEED) for i in range(2)]
                threads.append(threading.Thread(target=many, args=(reader, pieces, errors)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
        for receiver in "abc":
            for index, sender in enumerate("abc".replace(receiver, "")):
                landed = memories[receiver].slabs[4 + 2 * index : 6 + 2 * index]
                assert torch.equal(landed, memories[sender].slabs[:2])


def many(reader: Reader, pieces: list[Piece], errors: list[Exception]) -> None:
    try:
        for _ in range(30):
            reader.pull(pieces)
    except Exception as error:
        errors.append(error)


def test_without_their_libraries_device_transports_say_what_is_missing() -> None:
    from kv_transfer.cuda_runtime import CudaRuntime
    from kv_transfer.nccl_library import NcclLibrary

    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    with pytest.raises(ConfigError, match=r"libcudart|cudaGetDeviceCount"):
        CudaRuntime()
    with pytest.raises(ConfigError, match="libnccl"):
        NcclLibrary()


# With another process as the owner

OWNER = """
import sys, torch
from common.kv_layout import KVLayout
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import HandoffKey
from kv_transfer.transports.cuda_ipc import CudaIpcSource
from kv_transfer.transports.nixl import NixlSource
from kv_transfer.transports.shm import ShmSource
from kv_transfer.transports.tcp import TcpSource
from tests.support.fake_cuda import FakeCuda
class Pool:
    def acquire(self, blocks): pass
    def release(self, blocks): pass
layout = KVLayout.paged_attention(
    num_layers=8, num_kv_heads=8, head_dim=64, block_size=16, dtype="float32")
transport = sys.argv[1]
cuda = FakeCuda()
memory = (DevicePoolMemory(64, layout.slab_bytes, cuda) if transport == "cuda_ipc"
          else HostPoolMemory(64, layout.slab_bytes))
leases = Leases(Pool())
leases.add(HandoffKey("link", "request", 1, 0), list(range(64)))
for block in range(64):
    memory.begin_write(block)
    memory.slabs[block] = block
    memory.seal(block)
source = (
    ShmSource(memory, sys.argv[2]) if transport.startswith("shm")
    else CudaIpcSource(memory) if transport == "cuda_ipc"
    else NixlSource(memory) if transport == "nixl"
    else TcpSource(memory, layout, leases, secret_key=sys.argv[3]))
print("proof", source.open_link("link").hex(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def source_process(transport: str, *before: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """The owner's process, started by the command `before`; and the proof of its link."""
    root = Path(__file__).resolve().parents[2]
    folder = FOLDER.name if transport == "shm+folder" else ""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", OWNER, transport, folder, key_of(transport)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("proof "):
            assert line, "the owner's process ended"  # else a library that says hello
        yield process, bytes.fromhex(line.removeprefix("proof "))
    finally:
        process.kill()
        process.communicate()


def pull_until_it_fails(
    reader: Reader, target: Target, copied: threading.Event, errors: list[object]
) -> None:
    pieces = [Piece(b, b, 2, b, 0, b"", SEED, places(target, LARGE, b)) for b in range(64)]
    try:
        while not errors:
            reader.pull(pieces)
            copied.set()
    except Exception as error:
        errors.append(error)


@pytest.mark.parametrize("transport", ["shm", "tcp", "tcp+curve", "cuda_ipc", NIXL, "shm:48", "tcp:5"])
def test_kill_9_of_the_owner_while_the_reader_copies(transport: str) -> None:
    """tcp, nixl: a typed error at once. shm, cuda_ipc: the mapping outlives its owner, and is given
    back at close. In all no half-written block passes, and nothing is left behind."""
    target = target_for(transport, LARGE, 64)
    base = transport.partition(":")[0]
    with source_process(base) as (process, proof):
        reader = opener(transport, LARGE)("link", proof, target)
        copied, errors = threading.Event(), []
        thread = threading.Thread(target=pull_until_it_fails, args=(reader, target, copied, errors))
        thread.start()
        assert copied.wait(30)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if base in ("shm", "cuda_ipc"):
            copied.clear()
            assert copied.wait(30), "copies go on from the dead owner's pool"
            errors.append("enough")
        thread.join(30)
        assert not thread.is_alive()
        assert errors == ["enough"] or isinstance(errors[0], LinkLost)
        assert all((arrived(target, LARGE, b) == b).all() for b in range(64))
        reader.close()
    target.memory.close()


def test_a_socket_in_a_folder_reaches_into_another_network_namespace() -> None:
    """As between two containers of one host; an abstract socket ends at the border."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a network namespace (unshare --net)")
    target = Target(HostPoolMemory(64, LARGE.slab_bytes), LARGE)
    with (
        source_process("shm", "unshare", "--net") as (_, proof),
        pytest.raises(LinkLost, match="not on this host"),
    ):
        opener("shm", LARGE)("link", proof, target)
    with source_process("shm+folder", "unshare", "--net") as (process, proof):
        reader = opener("shm+folder", LARGE)("link", proof, target)
        reader.pull([Piece(b, b, 2, b, 0, b"", SEED) for b in range(64)])
        assert all((target.memory.slabs[b] == b).all() for b in range(64))
        reader.close()
        process.kill()
        process.wait()
        assert os.listdir(FOLDER.name), "kill -9 leaves the socket's file behind"
    with both_ends("shm+folder"):
        assert len(os.listdir(FOLDER.name)) == 1  # the next source removes it, and has its own
    target.memory.close()


def test_a_reader_with_a_folder_finds_a_source_without_one() -> None:
    with both_ends("shm") as end:
        end.fill(0)
        proof = end.source.open_link("link")
        end.readers.append(ShmReader.open("link", proof, end.target, folder=FOLDER.name))
        end.readers[-1].pull([end.piece(0, 1)])
        assert end.same(0, 1)


def test_a_folder_in_which_no_socket_can_be_made_is_one_line(tmp_path: Path) -> None:
    memory = HostPoolMemory(1, 64)
    try:
        for folder in (tmp_path / "missing", tmp_path / ("long" * 30)):
            with pytest.raises(ConfigError, match="--shm-dir"):
                ShmSource(memory, str(folder))
    finally:
        memory.close()


def test_the_name_of_a_source_leads_nowhere_else(tmp_path: Path) -> None:
    """It comes from a peer and becomes part of a path."""
    target = Target(HostPoolMemory(1, LAYOUT.slab_bytes), LAYOUT)
    try:
        for name in (b"../../../x.sock\0", b"/etc/passwd/abcd", b"\xff" * 16):
            with pytest.raises(LinkLost):
                ShmReader.open("link", name + b"n" * 32, target, folder=str(tmp_path))
    finally:
        target.memory.close()


@pytest.mark.parametrize("transport", ["tcp", "tcp+curve", NIXL, "tcp:48"])
def test_a_stopped_owner_is_left_by_closing_the_reader(transport: str) -> None:
    """SIGSTOP looks like a slow network: only whoever declares the death may end the wait. (nixl
    reads the memory of a process on the same host without its help, stopped or not.)"""
    target = target_for(transport, LARGE, 64)
    with source_process(transport.partition(":")[0]) as (process, proof):
        reader = opener(transport, LARGE)("link", proof, target)
        copied, errors = threading.Event(), []
        thread = threading.Thread(target=pull_until_it_fails, args=(reader, target, copied, errors))
        thread.start()
        assert copied.wait(30)
        process.send_signal(signal.SIGSTOP)
        reader.close()
        thread.join(30)
        assert isinstance(errors[0], LinkLost)
        process.send_signal(signal.SIGCONT)
    target.memory.close()


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
def test_nixl_writes_nothing_more_once_a_pull_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP a stopped owner leaves a read half done; it goes on, and its bytes come too late."""
    import nixl

    monkeypatch.setenv("UCX_TLS", "tcp")  # of both ends: no help from the kernel's shared memory
    target = Target(HostPoolMemory(64, LARGE.slab_bytes), LARGE)
    with source_process("nixl") as (process, proof):
        reader = NixlReader.open("link", proof, target)
        copied, errors = threading.Event(), []
        thread = threading.Thread(target=pull_until_it_fails, args=(reader, target, copied, errors))
        thread.start()
        assert copied.wait(30)
        process.send_signal(signal.SIGSTOP)
        copied.clear()
        while copied.wait(0.3):  # until one is under way and stands still
            copied.clear()
        gc.disable()
        try:
            reader.close()
            thread.join(30)
            assert len(errors) == 1
            assert isinstance(errors[0], LinkLost)
            left = [one for one in gc.get_objects() if type(one) is nixl.nixl_agent]
            assert left == [], "the agent has ended, and everything that it had under way"
        finally:
            gc.enable()
        target.memory.slabs.zero_()
        process.send_signal(signal.SIGCONT)
        assert not copied.wait(0.5)
        assert int(target.memory.slabs.max()) == 0
    target.memory.close()


@tcp_wires
def test_a_pull_that_begins_after_the_source_has_gone_is_a_lost_link(transport: str) -> None:
    """As on a node that was stopped meanwhile; it must not wait for a peer that never comes."""
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        end.source.close_link("link")
        if isinstance(reader._wire, ReceivingFrames):
            monitor = reader._wire._monitor
            wait_until(lambda: monitor.poll(0), "the connection is gone")
        with pytest.raises(LinkLost):
            reader.pull([end.piece(0, 0)])


def test_a_name_at_which_nobody_listens_opens_nothing() -> None:
    target = Target(HostPoolMemory(1, LAYOUT.slab_bytes), LAYOUT)
    with pytest.raises(LinkLost, match="not on this host"):
        ShmReader.open("link", b"0123456789abcdef" + bytes(32), target)
    target.memory.close()


STRANGER = """
import sys
from common.errors import LinkLost
from common.kv_layout import KVLayout
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.transports.base import Target
from kv_transfer.transports.shm import ShmReader
layout = KVLayout.paged_attention(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
target = Target(HostPoolMemory(1, layout.slab_bytes), layout)
try:
    ShmReader.open("link", bytes.fromhex(sys.argv[1]), target)
    print("opened")
except LinkLost as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("prefix", "outcome"),
    [
        ([], "opened"),
        (["unshare", "--net"], "refused: not on this host"),
        (["setpriv", "--reuid=65534", "--clear-groups"], "refused"),
    ],
    ids=["same", "another network namespace", "another user"],
)
def test_shm_is_for_processes_of_one_host_and_user(prefix: list[str], outcome: str) -> None:
    """A copied Hello opens nothing elsewhere: what proves the host is the connection itself."""
    if prefix and subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip(f"{prefix[0]} is not permitted here")
    root = Path(__file__).resolve().parents[2]
    with both_ends("shm") as end:
        proof = end.source.open_link("link").hex()
        done = subprocess.run(
            [*prefix, sys.executable, "-c", STRANGER, proof],
            cwd=root,
            text=True,
            check=False,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(root)},
            timeout=60,
        )
    assert done.stdout.startswith(outcome), done.stderr
