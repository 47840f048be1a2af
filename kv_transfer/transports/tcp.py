"""Slabs over TCP: the reader asks (`Pull`), the source sends (`Slabs`), and once the bytes have left
the pool, the source says whether the blocks were unchanged until then (`Proved`).

A link has a plain connection (tcp_stream.py), or ZeroMQ sockets with CURVE where its slabs must be
encrypted (tcp_frames.py). The source answers one pull after the other, and touches the lease of the
pull's blocks meanwhile. Slabs of a pool on a device pass through host memory, some at a time. The
reader digests each slab while it is in cache. The buffers of the kernel, and the queues of ZeroMQ's
sockets, bound the bytes under way.

Each link has sockets and a thread of its own: tearing a link down ends both, whatever the peer does.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence

from common.errors import DigestMismatch, InsufficientMemory, LinkLost, MalformedMessage, PdqError, StaleBlock
from common.kv_layout import KVLayout
from common.settings.config import is_loopback
from common.wire.codec import decode, encode
from common.wire.message import Message
from common.wire.messages import Proved, Pull, Slabs
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target
from kv_transfer.transports.seam import guarded
from kv_transfer.transports.tcp_frames import ReceivingFrames, SendingFrames
from kv_transfer.transports.tcp_stream import ReceivingStream, SendingStream
from kv_transfer.transports.wires import OPEN_TIMEOUT, STALL_TIMEOUT, ReceivingWire, SendingWire

WINDOW_BYTES = 8 << 20  # under way at once on a link, or two slabs where those are larger
_MAX_SLOTS = 1024  # of one Pull, which is a short message
_TOKEN_BYTES = 16


class TcpSource:
    """Serves the blocks of `memory` that are leased to a link, to the holder of its token."""

    name = "tcp"

    def __init__(
        self,
        memory: PoolMemory,
        layout: KVLayout,
        leases: Leases,
        *,
        host: str = "127.0.0.1",
        advertise_host: str = "",
        secret_key: str = "",
        encrypts: bool | None = True,
    ) -> None:
        """`host` is where to listen, `advertise_host` what peers connect to if that differs. Slabs are
        encrypted with `secret_key`, if there is one, where `encrypts` says so; None means everywhere but
        on loopback."""
        self.memory, self._layout, self._leases = memory, layout, leases
        self._host, self._advertise = host, advertise_host or host
        encrypts = not is_loopback(self._advertise) if encrypts is None else encrypts
        self._secret_key = secret_key if encrypts else ""
        self._served: dict[str, ServedLink] = {}

    def open_link(self, link: str) -> bytes:
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.close_link(link)
        wire, scheme = self._wire(token)
        try:
            self._served[link] = self._serve(link, token, wire)
        except BaseException:  # no thread, no stream of a device
            wire.close()
            raise
        return token + f"{scheme}://{self._advertise}:{wire.port}".encode()

    def _wire(self, token: bytes) -> tuple[SendingWire, str]:
        if self._secret_key:
            return SendingFrames(self._host, self._secret_key), "zmq"
        return SendingStream(self._host, token), "tcp"

    def _serve(self, link: str, token: bytes, wire: SendingWire) -> ServedLink:
        return ServedLink(self, link, token, wire)

    def close_link(self, link: str) -> None:
        served = self._served.get(link)
        if served is not None:
            served.close()
            self._served.pop(link, None)

    def close(self) -> None:
        for link in list(self._served):
            self.close_link(link)


class ServedLink:
    """One link of a source: a thread at its wire."""

    def __init__(self, source: TcpSource, link: str, token: bytes, wire: SendingWire) -> None:
        self._memory, self._layout, self._leases = source.memory, source._layout, source._leases
        self._link, self._token, self._wire = link, token, wire
        self._most_slots = slots_per_pull(wire, source.memory.slab_bytes)
        self._closing = False
        self._thread = threading.Thread(target=self._run, args=(source.name,), name="tcp-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._wire.stop()
        self._thread.join()

    def _run(self, transport: str) -> None:
        with contextlib.suppress(PdqError):
            guarded(transport, self._serve)

    def _serve(self) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(self._on_ended)
            ending.callback(self._wire.close)
            while (heard := self._wire.receive()) is not None:
                self._handle(*heard)

    def _handle(self, peer: bytes, said: bytes) -> None:
        try:
            message = decode(said)
        except MalformedMessage:
            return
        if not isinstance(message, Pull) or message.link != self._link:
            return
        if not hmac.compare_digest(message.token, self._token):
            return
        if len(message.slots) > self._most_slots:
            self._send(peer, Slabs(self._link, message.number, "too_many"))
        elif not self._is_unchanged(message) or not self._leases.touch(self._link, message.slots):
            self._send(peer, Slabs(self._link, message.number, "stale_block"))
        else:
            self._answer(peer, message)

    def _answer(self, peer: bytes, pull: Pull) -> None:
        """Send the blocks of a pull, which are touched until they have left, then the proof."""
        try:
            self._send_slabs(peer, pull)
            unchanged = self._is_unchanged(pull)
        finally:
            self._leases.untouch(self._link, pull.slots)
        self._send(peer, Proved(self._link, pull.number, unchanged))

    def _send_slabs(self, peer: bytes, pull: Pull) -> None:
        """Send what a pull asks for. Nothing refers to the pool any more when this ends."""
        ranges = self._layout_of(pull).ranges(pull.fill)
        batches = (
            [slab[at : at + n] for slab in batch for at, n in ranges]
            for batch in self._memory.to_host(pull.slots)
        )
        self._wire.send_slabs(peer, encode(Slabs(self._link, pull.number, "")), batches)

    def _layout_of(self, pull: Pull) -> KVLayout:
        return self._layout if pull.with_draft else self._layout.without_draft

    def _on_ended(self) -> None:
        """Called when the thread ends and the wire is closed."""

    def _is_unchanged(self, pull: Pull) -> bool:
        if len(pull.slots) != len(pull.generations) or (pull.fill and len(pull.slots) != 1):
            return False
        if pull.fill and not 0 < pull.fill < self._layout.block_size:
            return False
        generations = self._memory.generations
        return all(
            0 <= slot < self._memory.num_blocks
            and generation % 2 == 0
            and int(generations[slot]) == generation
            for slot, generation in zip(pull.slots, pull.generations, strict=True)
        )

    def _send(self, peer: bytes, message: Message) -> None:
        self._wire.send(peer, encode(message))


class TcpReader:
    """The asking end of one link."""

    remark = ""
    open_timeout_s = OPEN_TIMEOUT
    stall_timeout_s = STALL_TIMEOUT

    def __init__(self, link: str, token: bytes, target: Target, wire: ReceivingWire) -> None:
        self._link, self._token, self._target, self._wire = link, token, target, wire
        self._lock = threading.Lock()  # held by whoever uses the wire
        self._number = 0
        self._closed = False
        self._out_of_step = False  # a pull ended while something was on its way

    @classmethod
    def open(
        cls, link: str, proof: bytes, target: Target, secret_key: str = "", encrypts: bool | None = True
    ) -> TcpReader:
        """Connect, and prove by an empty pull that the source answers and knows the token. A reader that
        `encrypts` (None means everywhere but on loopback) refuses plain text."""
        token, scheme, host, port = split_proof(proof)
        encrypts = not is_loopback(host) if encrypts is None else encrypts
        wire: ReceivingWire
        if scheme == "zmq":
            slab_bytes = target.layout.slab_bytes
            wire = ReceivingFrames(f"tcp://{host}:{port}", secret_key, slab_bytes)
        elif secret_key and encrypts:
            raise LinkLost("the source sends blocks in plain text, and this node encrypts them")
        else:
            wire = ReceivingStream(host, port, token, cls.open_timeout_s)
        with contextlib.ExitStack() as made:
            made.callback(wire.close)
            reader = cls(link, token, target, wire)
            made.pop_all()
            made.callback(reader.close)  # which closes its wire
            if secret_key:
                reader.remark = f"blocks are {'encrypted' if scheme == 'zmq' else 'in plain text'}"
            reader._prove_link()
            made.pop_all()
        return reader

    def _prove_link(self) -> None:
        self._pull([()], self.open_timeout_s)

    def pull(self, pieces: Sequence[Piece]) -> None:
        self._pull(self._portions(pieces), self.stall_timeout_s)

    def _portions(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
        """Split the pieces into one portion for each Pull: whole slabs together, a tail alone."""
        full = [piece for piece in pieces if not piece.fill]
        count = slots_per_pull(self._wire, self._target.source_slab_bytes)
        for start in range(0, len(full), count):
            yield tuple(full[start : start + count])
        for piece in pieces:
            if piece.fill:
                yield (piece,)

    def _window(self) -> int:
        """Number of requests that may be under way at once."""
        slab_bytes = self._target.layout.slab_bytes
        return max(2, WINDOW_BYTES // max(self._wire.request_bytes, slab_bytes))

    def _pull(self, requests: Iterable[tuple[Piece, ...]], timeout: float) -> None:
        """Keep the window full until every request is copied, checked and proved.

        After a failure the reader asks for nothing more, but still receives what is on its way, so
        that the next pull finds the link empty. If that fails, the link is lost for all later pulls.
        """
        with self._lock:
            if self._out_of_step:
                raise LinkLost("an earlier pull has lost the link")
            self._out_of_step = True  # unless it is received to its end
            try:
                failure = self._run_pull(iter(requests), timeout)
            except InsufficientMemory as error:
                raise LinkLost(f"what is on its way cannot be received: {error}") from error
            self._out_of_step = False
        if failure is not None:
            raise failure

    def _run_pull(self, waiting: Iterator[tuple[Piece, ...]], timeout: float) -> PdqError | None:
        arriving: dict[int, tuple[Piece, ...]] = {}  # asked for
        proving: set[int] = set()  # arrived, not proved
        failure: PdqError | None = None
        self._fill_window(waiting, arriving)
        while arriving or (proving and failure is None):
            message = self._receive(timeout)
            if isinstance(message, Proved) and message.number in proving:
                proving.remove(message.number)
                if not message.unchanged:
                    failure = StaleBlock("a block was reused while it was being sent")
            if not isinstance(message, Slabs):
                continue
            pieces = arriving.pop(message.number, None)
            if message.refused:
                if pieces is not None:
                    failure = StaleBlock("a block is not leased to this link any more")
                continue
            if pieces is None:
                raise LinkLost("the source sends what nobody asked for")
            if failure is None:
                proving.add(message.number)
                self._fill_window(waiting, arriving)
            failure = self._receive_slabs(pieces) or failure
        return failure

    def _fill_window(
        self, waiting: Iterator[tuple[Piece, ...]], arriving: dict[int, tuple[Piece, ...]]
    ) -> None:
        """Fill the window."""
        for pieces in itertools.islice(waiting, self._window() - len(arriving)):
            arriving[self._request(pieces)] = pieces

    def _request(self, pieces: tuple[Piece, ...]) -> int:
        number, self._number = self._number, self._number + 1
        fill = pieces[0].fill if pieces else 0
        slots = tuple(piece.slot for piece in pieces)
        generations = tuple(piece.generation for piece in pieces)
        self._send(Pull(self._link, self._token, number, slots, generations, fill, self._target.with_draft))
        return number

    def _send(self, message: Message) -> None:
        if self._closed:
            raise LinkLost("the link was closed")
        self._wire.send(encode(message))

    def _receive(self, timeout: float) -> Message:
        return decode(self._wire.receive(timeout))

    def _receive_slabs(self, pieces: tuple[Piece, ...]) -> PdqError | None:
        """Receive the slabs of one request into their blocks, even those behind a wrong one. Returns
        the first error; raises `LinkLost`."""
        failure: PdqError | None = None
        at_once = self._target.memory.at_once
        for start in range(0, len(pieces), at_once):
            found = self._receive_some(pieces[start : start + at_once])
            failure = failure or found
        return failure

    def _receive_some(self, pieces: tuple[Piece, ...]) -> PdqError | None:
        failure: PdqError | None = None
        target = self._target
        places = [(piece.block, target.ranges(piece)) for piece in pieces]
        with target.memory.from_host(places) as slabs:
            for view in itertools.chain.from_iterable(slabs):
                try:
                    self._wire.read_into(view)
                except MalformedMessage as error:
                    failure = failure or error
        for piece in pieces:
            try:
                target.check(piece)
            except DigestMismatch as error:
                failure = failure or error
        return failure

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wire.stop()
        with self._lock:
            try:
                self._wire.close()
            finally:
                self._on_closed()

    def _on_closed(self) -> None:
        """Called when the link has ended and no pull runs."""


def slots_per_pull(wire: SendingWire | ReceivingWire, slab_bytes: int) -> int:
    """Number of slabs, of the source's size, that one Pull may ask for."""
    return min(max(1, wire.request_bytes // slab_bytes), _MAX_SLOTS)


def split_proof(proof: bytes) -> tuple[bytes, str, str, int]:
    """Take apart a proof: the link's token, and the source's scheme, host and port."""
    try:
        scheme, _, address = proof[_TOKEN_BYTES:].decode("ascii").partition("://")
        host, _, port = address.rpartition(":")
        if scheme not in ("tcp", "zmq") or not host or not 0 < int(port) < 1 << 16:
            raise ValueError(address)
    except ValueError as error:  # UnicodeDecodeError, too
        raise MalformedMessage("not the address of a source", param="proofs") from error
    return proof[:_TOKEN_BYTES], scheme, host, int(port)
