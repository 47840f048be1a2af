"""Slabs by NCCL: a communicator of two ranks for each link. Requests and proofs go as in tcp.py.

The reader asks by `Pull`. The source answers `Slabs` and puts one send of all of it on its stream; the
reader puts the receive on its own stream, straight into its pool. When the device has sent, the source
says `Proved`.

Several communicators on one device must not wait for each other crosswise, because a kernel of NCCL holds
the device until the peer's kernel runs. So each device of a process has two turns, which all take in the
same order: a reader takes its device's turn to receive before it asks, and the source takes its device's
turn to send before it answers. A holder of the turn to send waits for nobody, since the reader that asked
already holds its own turn. So no circle of waits can close, and each device runs at most one send and one
receive at a time. A stopped peer keeps a turn until its time is over or its link is torn down.

A communicator is set up when a reader asks for it, without blocking. The reader aborts it before a failed
pull reports, that is, before the blocks that it was receiving into can be given back; the source aborts
it before the lease ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from common.errors import DigestMismatch, LinkLost, PdqError
from common.kv_layout import KVLayout
from common.logs import get_logger
from common.wire.codec import encode
from common.wire.messages import Pull, Slabs
from kv_transfer.cuda import Cuda, Stream
from kv_transfer.lease import Leases
from kv_transfer.nccl_library import ID_BYTES, Communicator, Nccl, Ranges
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports import tcp
from kv_transfer.transports.base import Target
from kv_transfer.transports.tcp_frames import ReceivingFrames, SendingFrames
from kv_transfer.transports.wires import STALL_TIMEOUT, ReceivingWire, SendingWire

log = get_logger("kv")

_POLL_S = (0.00005, 0.001)  # the first pause between two looks at the device, and the longest
ABORT_S = 5.0  # for an aborted kernel to leave the device


class Turns:
    """The turns of one process: for each device one to send and one to receive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[tuple[int, str], threading.Lock] = {}

    def of(self, device: int, direction: str) -> threading.Lock:
        with self._lock:
            return self._turns.setdefault((device, direction), threading.Lock())


class Channel:
    """One end of a pair: its communicator, its stream, and the turn that it works in."""

    setup_timeout_s = 30.0  # for both ends to set a communicator up

    def __init__(
        self, cuda: Cuda, nccl: Nccl, turn: threading.Lock, *, sends: bool, is_closing: Callable[[], bool]
    ) -> None:
        self._device, self._nccl = cuda.index, nccl
        self._turn, self._sends, self._is_closing = turn, sends, is_closing
        self._pair: Communicator | None = None
        self._stream: Stream | None = cuda.stream()
        self._has_turn = False
        self._pause = _POLL_S[0]

    def take_turn(self) -> None:
        while not self._turn.acquire(timeout=0.02):
            self._require_open()
        self._has_turn = True

    def give_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turn.release()

    def set_up(self, unique_id: bytes) -> None:
        """Wait until both ends are in the communicator. `LinkLost`, and nothing is left."""
        rank = 0 if self._sends else 1
        try:
            self._pair = self._nccl.communicator(self._device, unique_id, rank)
            self._wait_ready(self.setup_timeout_s)
        except BaseException:
            self.abort()
            raise

    def begin(self, ranges: Ranges) -> None:
        """Put one exchange on the stream."""
        if self._pair is None or self._stream is None:
            raise LinkLost("the communicator was aborted")
        self._pause = _POLL_S[0]
        self._pair.exchange(ranges, self._stream.handle, send=self._sends)
        self._wait_ready(STALL_TIMEOUT)

    def is_done(self) -> bool:
        return self._stream is None or self._stream.is_done()

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        assert self._pair is not None
        while not self._pair.is_ready():
            self.pause(deadline)

    def pause(self, deadline: float) -> None:
        """Sleep for a moment, longer each time: a peer that stands still costs nobody the interpreter.
        `LinkLost` when the link closes or the deadline has passed."""
        self._require_open()
        if time.monotonic() > deadline:
            raise LinkLost("the peer's end of the communicator does not answer")
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, _POLL_S[1])

    def _require_open(self) -> None:
        if self._is_closing():
            raise LinkLost("the link was closed")

    def abort(self) -> None:
        """End the communicator: the device does nothing more for this link when this returns."""
        try:
            if self._pair is not None:
                self._pair.abort()
                self._pair = None
            if self._stream is not None:
                self._end(self._stream)
                self._stream = None
        finally:
            self.give_turn()

    def _end(self, stream: Stream) -> None:
        """Wait for the aborted kernel: a library that aborts in the background has only begun to."""
        deadline = time.monotonic() + ABORT_S
        while not stream.is_done():
            if time.monotonic() > deadline:
                log.error("nccl.not_aborted", seconds=ABORT_S)
                break
            time.sleep(_POLL_S[1])
        stream.close()


class NcclSource(tcp.TcpSource):
    """Serves leased blocks of a device pool."""

    name = "nccl"

    def __init__(
        self,
        memory: PoolMemory,
        layout: KVLayout,
        leases: Leases,
        cuda: Cuda,
        nccl: Nccl,
        turns: Turns,
        *,
        host: str = "127.0.0.1",
        advertise_host: str = "",
        secret_key: str = "",
    ) -> None:
        super().__init__(
            memory, layout, leases, host=host, advertise_host=advertise_host, secret_key=secret_key
        )
        self.cuda, self.nccl, self.turns = cuda, nccl, turns

    def _wire(self, token: bytes) -> tuple[SendingWire, str]:
        return SendingFrames(self._host, self._secret_key), "zmq"

    def _serve(self, link: str, token: bytes, wire: SendingWire) -> tcp.ServedLink:
        return _ServedNcclLink(self, link, token, wire)


class _ServedNcclLink(tcp.ServedLink):
    """One link: the thread of tcp.py, but it sends by the communicator."""

    def __init__(self, source: NcclSource, link: str, token: bytes, wire: SendingWire) -> None:
        turn = source.turns.of(source.cuda.index, "send")
        self._nccl, self._unique_id = source.nccl, b""
        self._channel = Channel(source.cuda, source.nccl, turn, sends=True, is_closing=lambda: self._closing)
        self._is_set_up = False
        try:
            super().__init__(source, link, token, wire)
        except BaseException:  # no thread
            self._channel.abort()
            raise

    def _send_slabs(self, peer: bytes, pull: Pull) -> None:
        """Answer the first empty pull with the communicator's id, and set the communicator up at the
        second one. Returns when the device has sent the slabs; raises when it does nothing more."""
        header = encode(Slabs(self._link, pull.number, ""))
        if pull.slots:
            self._send_ranges(peer, header, pull)
        elif not self._unique_id:
            self._unique_id = self._nccl.unique_id()
            self._wire.send_slabs(peer, header, [[memoryview(self._unique_id)]])
        else:
            self._wire.send(peer, header)
            if not self._is_set_up:
                self._channel.set_up(self._unique_id)
                self._is_set_up = True

    def _send_ranges(self, peer: bytes, header: bytes, pull: Pull) -> None:
        self._channel.take_turn()
        try:
            self._wire.send(peer, header)
            self._channel.begin(self._ranges(pull))
            deadline = time.monotonic() + STALL_TIMEOUT  # the reader asked, and has its turn: it is there
            while not self._channel.is_done():
                self._channel.pause(deadline)
        except BaseException:
            self._channel.abort()  # before the blocks are let go
            raise
        self._channel.give_turn()

    def _ranges(self, pull: Pull) -> list[tuple[int, int]]:
        memory, ranges = self._memory, self._layout_of(pull).ranges(pull.fill)
        return [(memory.address(slot) + offset, length) for slot in pull.slots for offset, length in ranges]

    def _on_ended(self) -> None:
        self._channel.abort()


class NcclReader(tcp.TcpReader):
    """The asking end of one link."""

    setup_timeout_s = Channel.setup_timeout_s

    def __init__(
        self,
        link: str,
        token: bytes,
        target: Target,
        wire: ReceivingWire,
        cuda: Cuda,
        nccl: Nccl,
        turns: Turns,
    ) -> None:
        turn = turns.of(cuda.index, "receive")
        self._channel = Channel(cuda, nccl, turn, sends=False, is_closing=lambda: self._closed)
        self._unique_id = b""
        self._pulling = threading.Lock()  # one pull at a time: it has the turn
        try:
            super().__init__(link, token, target, wire)
        except BaseException:
            self._channel.abort()
            raise

    @classmethod
    def connect(
        cls,
        link: str,
        proof: bytes,
        target: Target,
        cuda: Cuda,
        nccl: Nccl,
        turns: Turns,
        secret_key: str = "",
    ) -> NcclReader:
        """Ask for the communicator's id, which proves the token, then meet the source in it."""
        token, _, host, port = tcp.split_proof(proof)
        wire = ReceivingFrames(f"tcp://{host}:{port}", secret_key, 0)
        with contextlib.ExitStack() as made:
            made.callback(wire.close)
            reader = cls(link, token, target, wire, cuda, nccl, turns)
            made.pop_all()
            made.callback(reader.close)  # which closes its wire
            reader._prove_link()  # the first pull of nothing
            reader._pull([()], cls.setup_timeout_s)
            made.pop_all()
        return reader

    def pull(self, pieces: Sequence[Piece]) -> None:
        with self._in_turn():
            super().pull(pieces)

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        with self._pulling:
            self._channel.take_turn()
            try:
                yield
            finally:
                self._channel.give_turn()

    def _window(self) -> int:
        return 1

    def _receive_slabs(self, pieces: tuple[Piece, ...]) -> PdqError | None:
        if pieces:
            return self._exchanged(pieces)
        if not self._unique_id:
            unique_id = bytearray(ID_BYTES)
            self._wire.read_into(memoryview(unique_id))
            self._unique_id = bytes(unique_id)
        else:
            self._channel.set_up(self._unique_id)
        return None

    def _exchanged(self, pieces: tuple[Piece, ...]) -> PdqError | None:
        target = self._target
        ranges = [
            (target.memory.address(piece.block) + offset, length)
            for piece in pieces
            for offset, length in target.ranges(piece)
        ]
        deadline = time.monotonic() + self.stall_timeout_s
        try:
            self._channel.begin(ranges)
            while not self._channel.is_done():
                self._channel.pause(deadline)
        except BaseException:
            self._channel.abort()  # before anybody hears that the blocks are free
            raise
        try:
            for piece in pieces:
                target.check(piece)
        except DigestMismatch as error:
            return error
        return None

    def _on_closed(self) -> None:
        self._channel.abort()
