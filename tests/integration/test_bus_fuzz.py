"""Whatever a stranger says to a bus, and whoever a bus connects to: its other peers are served on.

Framing and handshake of ZeroMQ itself are libzmq's; what comes out of them (routing ids, frames,
first messages) is ours. The bytes of messages are in tests/fuzz.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.bus import Bus
from common.wire.codec import encode
from common.wire.message import HandoffKey
from common.wire.messages import Abort, Beat, Goodbye, Open, Over
from tests.support.bus_key import bus_settings, lock
from tests.support.redis import HANGS_S
from tests.unit.test_codec import MESSAGE

CALM = bus_settings(beat_interval_s=60.0, max_message_bytes=4096)
LAST = Abort(HandoffKey("l", "last", 1, 0), "")
few = settings(max_examples=40, deadline=None)

FRAME = st.one_of(
    st.binary(max_size=60),
    MESSAGE.map(encode),
    st.sampled_from([encode(Beat("b-1", 0, False)), encode(Goodbye("b-1")), b"", bytes(5000)]),
    st.sampled_from([encode(Open("b-2", "a-1")), encode(Open("s-1", "")), encode(Over("", ""))]),
)

TALK = st.lists(st.lists(FRAME, min_size=1, max_size=4), max_size=5)
ROUTING_ID = st.one_of(
    st.binary(min_size=1, max_size=40).filter(lambda name: name[0] != 0),  # that is ZeroMQ's own
    # Who takes the name of a peer takes its place: names are proven by CURVE, and by nothing else.
    st.sampled_from([b"b-2/aa", b"/", b"a-1/x", b"x/", b"/x", b"s-1/1", b"\xff/\xff", b"s/" * 99]),
)


async def hear(bus: Bus, peer: str) -> str:
    """Until the last message of `peer` is here; what others said before it is theirs to say. The
    link that it came over: a stranger may have another under the same name."""
    async with asyncio.timeout(HANGS_S):
        while True:
            got = await bus.receive()
            if got.peer == peer and got.message == LAST:
                return got.link


@contextlib.asynccontextmanager
async def socket_of(kind: int) -> AsyncIterator[zmq.asyncio.Socket]:
    """Ends with its context, whatever happens meanwhile."""
    context = zmq.asyncio.Context()
    stranger = context.socket(kind)
    lock(stranger, listens=kind == zmq.ROUTER)
    try:
        yield stranger
    finally:
        stranger.close(linger=0)
        context.term()


@given(routing_id=ROUTING_ID, talk=TALK, raw=st.binary(max_size=80))
@few
def test_a_bus_hears_its_peers_whatever_a_stranger_sends_it(
    routing_id: bytes, talk: Sequence[Sequence[bytes]], raw: bytes
) -> None:
    async def scenario() -> None:
        async with socket_of(zmq.DEALER) as stranger, Bus("a-1", CALM) as bus, Bus("b-1", CALM) as peer:
            stranger.setsockopt(zmq.ROUTING_ID, routing_id)
            host, _, port = bus.endpoint.removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(raw)
            stranger.connect(bus.endpoint)
            for frames in talk:
                await stranger.send_multipart(frames)
            peer.connect("a-1", bus.endpoint)
            peer.send("a-1", LAST)
            link = await hear(bus, "b-1")
            bus.send("b-1", LAST, link=link)
            await hear(peer, "a-1")

    asyncio.run(scenario())


@given(talk=TALK)
@few
def test_a_bus_hears_its_peers_whatever_it_is_connected_to(talk: Sequence[Sequence[bytes]]) -> None:
    async def scenario() -> None:
        async with socket_of(zmq.ROUTER) as stranger, Bus("a-1", CALM) as bus, Bus("b-1", CALM) as peer:
            port = stranger.bind_to_random_port("tcp://127.0.0.1")
            bus.connect("s-1", f"tcp://127.0.0.1:{port}")
            async with asyncio.timeout(HANGS_S):
                routing_id = (await stranger.recv_multipart())[0]
            for frames in talk:
                await stranger.send_multipart([routing_id, *frames])
            peer.connect("a-1", bus.endpoint)
            peer.send("a-1", LAST)
            await hear(bus, "b-1")

    asyncio.run(scenario())
