"""The bus over real sockets: messages, links, and the deaths that a peer can see."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq

from common.errors import ConfigError, LinkLost, ResourceError
from common.settings.config import BusSettings
from common.wire.bus import INBOX, Bus, Down, LinkEvent, Progress
from common.wire.codec import decode, encode
from common.wire.message import HandoffKey
from common.wire.messages import Abort, Beat, Cancel, Open, Over, Release
from tests.support.bus_key import bus_settings, lock
from tests.support.holdings import holdings
from tests.support.redis import HANGS_S, wait_until

FAST = bus_settings(beat_interval_s=0.02, missed_beats=25, stall_limit_s=0.5)  # to see a death
CALM = bus_settings(beat_interval_s=60.0)  # however busy the machine is, nobody is taken for dead


def a_message(text: str = "why") -> Abort:
    return Abort(HandoffKey("l", "r", 1, 0), text)


@asynccontextmanager
async def buses(
    *names: str, settings: BusSettings = CALM, progress: Progress = lambda: (0, False), inbox: int = INBOX
) -> AsyncIterator[list[Bus]]:
    made = [Bus(name, settings, progress=progress, inbox=inbox) for name in names]
    for bus in made:
        await bus.start()
    try:
        yield made
    finally:
        for bus in made:
            await bus.close()


async def until_down(bus: Bus) -> LinkEvent:
    async with asyncio.timeout(HANGS_S):
        while (event := await bus.next_event()).up:
            pass
    return event


async def until_up(bus: Bus) -> LinkEvent:
    async with asyncio.timeout(HANGS_S):
        while not (event := await bus.next_event()).up:
            pass
    return event


async def received(bus: Bus) -> tuple[str, object]:
    async with asyncio.timeout(HANGS_S):
        got = await bus.receive()
    return got.peer, got.message


async def test_messages_travel_both_ways_over_one_link() -> None:
    async with buses("a-1", "b-1") as (a, b):
        link = a.connect("b-1", b.endpoint)
        a.send("b-1", a_message("there"))
        assert await received(b) == ("a-1", a_message("there"))
        b.send("a-1", a_message("back"))
        assert await received(a) == ("b-1", a_message("back"))
        assert a.link("b-1") == b.link("a-1") == link
        assert a.connect("b-1", b.endpoint) == link, "connecting again keeps the link"
        assert (await until_up(a)).link == (await until_up(b)).link == link
        assert a.peers() == {"b-1"}


async def test_messages_of_a_link_arrive_in_order_and_complete() -> None:
    async with buses("a-1", "b-1") as (a, b):
        a.connect("b-1", b.endpoint)
        for number in range(500):
            a.send("b-1", a_message(str(number)))
        got = [(await received(b))[1] for _ in range(500)]
        assert got == [a_message(str(number)) for number in range(500)]


async def test_without_a_link_or_with_another_one_sending_is_a_typed_error() -> None:
    async with buses("a-1", "b-1") as (a, b):
        with pytest.raises(LinkLost, match="no link with b-1"):
            a.send("b-1", a_message())
        link = a.connect("b-1", b.endpoint)
        with pytest.raises(LinkLost):
            a.send("b-1", a_message(), link="an older one")
        a.send("b-1", a_message(), link=link)
        assert (await received(b))[1] == a_message()
        with pytest.raises(LinkLost, match="not an address"):
            a.connect("c-1", "nonsense")


async def test_every_reconnect_is_a_new_link() -> None:
    async with buses("a-1", "b-1") as (a, b):
        first = a.connect("b-1", b.endpoint)
        await until_up(a)
        a.disconnect("b-1")
        assert (await until_down(a)).reason is Down.CLOSED
        second = a.connect("b-1", b.endpoint)
        a.send("b-1", a_message())
        await received(b)
        assert second != first
        assert b.link("a-1") == second


@pytest.mark.parametrize("gives_up", ["who connected", "who listened"])
async def test_what_one_end_gives_up_the_other_hears_at_once(gives_up: str) -> None:
    async with buses("a-1", "b-1") as (a, b):
        link = a.connect("b-1", b.endpoint)
        await until_up(a)
        await until_up(b)
        one, other = (a, b) if gives_up == "who connected" else (b, a)
        one.disconnect(other.incarnation)
        heard = await until_down(other)
        assert (heard.peer, heard.link, heard.reason) == (one.incarnation, link, Down.OVER)
        assert one.counts["over"] == 0, "who said it is told nothing"


async def test_who_missed_the_end_of_a_link_hears_it_in_answer_to_its_next_word() -> None:
    """Here the listener has forgotten the link, as a bus that never had it would."""
    async with buses("a-1", "b-1") as (a, b):
        first = a.connect("b-1", b.endpoint)
        await until_up(a)
        await until_up(b)
        (link,) = b._links
        b._links.end(link, Down.SILENT, silently=True)
        assert a.link("b-1") == first
        a.send("b-1", a_message("nobody reads this"))
        assert (await until_down(a)).reason is Down.OVER
        a.connect("b-1", b.endpoint)
        a.send("b-1", a_message("but this"))
        assert (await received(b))[1] == a_message("but this")


async def test_a_goodbye_that_was_lost_is_made_up_for_by_the_next_link() -> None:
    async with buses("a-1", "b-1") as (a, b):
        first = a.connect("b-1", b.endpoint)
        await until_up(b)
        (link,) = a._links
        a._links.end(link, Down.SILENT, silently=True)
        assert b.link("a-1") == first, "nobody told it"
        second = a.connect("b-1", b.endpoint)
        assert ((await until_down(b)).link, b.link("a-1")) == (first, second)


async def test_a_link_is_never_made_by_anything_but_its_opening() -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.ROUTING_ID, b"x-1/link")
    lock(raw)
    try:
        async with buses("a-1") as (a,):
            raw.connect(a.endpoint)
            for wrong in (a_message(), Beat("x-1", 0, False), Open("x-1", "b-1"), Open("y", "a-1")):
                raw.send(encode(wrong))
                await wait_until(lambda: bool(raw.poll(0)), "it is answered")
                assert decode(raw.recv()) == Over("a-1", "unknown link")
            raw.send(encode(Over("x-1", "so be it")))
            raw.send(encode(Open("x-1", "a-1")))
            assert (await until_up(a)).peer == "x-1"
            await wait_until(lambda: bool(raw.poll(0)), "it is answered")
            assert isinstance(decode(raw.recv()), Beat), "and Over never was"
    finally:
        raw.close()
        context.term()


async def test_a_peer_that_ends_in_order_says_goodbye() -> None:
    async with buses("a-1", "b-1") as (a, b):
        a.connect("b-1", b.endpoint)
        await until_up(a)
        await until_up(b)
        await b.close()
        assert (await until_down(a)).reason is Down.GOODBYE
        c = Bus("c-1", CALM)
        await c.start()
        c.connect("a-1", a.endpoint)
        assert (await until_up(a)).peer == "c-1"
        await c.close()
        gone = await until_down(a)
        assert (gone.peer, gone.reason) == ("c-1", Down.GOODBYE)


async def test_nobody_listening_is_noticed_without_waiting_for_beats() -> None:
    async with buses("a-1", "b-1") as (a, b):
        endpoint = b.endpoint
        await b.close()
        a.connect("b-1", endpoint)
        assert (await until_down(a)).reason is Down.UNREACHABLE
        assert a.link("b-1") is None


async def test_an_impostor_at_the_address_of_a_peer_is_recognised() -> None:
    async with buses("a-1", "b-2") as (a, b):
        a.connect("b-1", b.endpoint)  # b-1 is gone, b-2 listens on its port
        assert (await until_down(a)).reason is Down.IMPOSTOR


PEER = """
import asyncio, sys
from common.wire.bus import Bus
from tests.support.bus_key import bus_settings

async def main():
    interval, missed = float(sys.argv[1]), int(sys.argv[2])
    bus = Bus("b-1", bus_settings(beat_interval_s=interval, missed_beats=missed))
    await bus.start()
    if len(sys.argv) > 3:
        bus.connect(*sys.argv[3:])
    print(bus.endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def a_peer_process(
    beat_interval_s: float, missed_beats: int = 5, *, connects_to: tuple[str, ...] = ()
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PEER,
        str(beat_interval_s),
        str(missed_beats),
        *connects_to,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_kill_9_is_noticed_without_waiting_for_beats() -> None:
    async with buses("a-1") as (a,), a_peer_process(60.0) as (process, endpoint):
        a.connect("b-1", endpoint)
        await until_up(a)
        process.kill()
        assert (await until_down(a)).reason is Down.DISCONNECTED


async def test_a_stopped_peer_is_silent_and_what_it_says_later_is_dropped() -> None:
    async with buses("a-1", settings=FAST) as (a,), a_peer_process(0.02) as (process, endpoint):
        first = a.connect("b-1", endpoint)
        await until_up(a)
        process.send_signal(signal.SIGSTOP)
        assert (await until_down(a)).reason is Down.SILENT
        process.send_signal(signal.SIGCONT)
        assert a.connect("b-1", endpoint) != first
        assert (await until_up(a)).peer == "b-1"


async def test_of_a_stopped_peer_that_had_connected_no_connection_is_left() -> None:
    async with buses("a-1", settings=FAST) as (a,):
        port = int(a.endpoint.rpartition(":")[2])

        def connected() -> bool:
            return any(c.own.port == port for c in holdings(os.getpid()).connections)

        async with a_peer_process(0.02, connects_to=("a-1", a.endpoint)) as (process, _):
            await until_up(a)
            assert connected()
            process.send_signal(signal.SIGSTOP)
            assert (await until_down(a)).reason is Down.SILENT
            await wait_until(lambda: not connected(), "its connection is closed")


async def test_a_peer_that_is_busy_without_progress_is_stalled() -> None:
    steps = iter(range(10**9))
    stuck = asyncio.Event()

    def progress() -> tuple[int, bool]:
        return (7 if stuck.is_set() else next(steps) + 100, True)

    async with buses("b-1", settings=FAST, progress=progress) as (b,), buses("a-1", settings=FAST) as (a,):
        a.connect("b-1", b.endpoint)
        await until_up(a)
        before = a.counts["received"]
        await wait_until(lambda: a.counts["received"] > before + 20, "twenty beats have come")
        assert a.peers() == {"b-1"}, "progress is life"
        stuck.set()
        assert (await until_down(a)).reason is Down.STALLED


async def test_an_idle_peer_need_not_step() -> None:
    async with buses("a-1", "b-1", settings=FAST) as (a, b):
        a.connect("b-1", b.endpoint)
        before = a.counts["received"]
        await wait_until(lambda: a.counts["received"] > before + 20, "twenty beats have come")
        assert a.peers() == {"b-1"}


async def test_our_own_stop_is_not_held_against_peers() -> None:
    async with buses("a-1", settings=FAST) as (a,), a_peer_process(0.02, 10_000) as (_, endpoint):
        a.connect("b-1", endpoint)
        await until_up(a)
        before = a.counts["received"]
        # nothing of this loop runs for three times the limit, as after SIGSTOP and SIGCONT
        time.sleep(3 * FAST.missed_beats * FAST.beat_interval_s)  # noqa: ASYNC251
        await wait_until(lambda: a.counts["received"] > before + 60, "beats come again")
        assert a.peers() == {"b-1"}


async def test_a_full_inbox_is_not_held_against_peers() -> None:
    async with buses("b-1", settings=FAST, inbox=1) as (b,), buses("a-1", settings=FAST) as (a,):
        a.connect("b-1", b.endpoint)
        for number in range(10):
            a.send("b-1", a_message(str(number)))
        before = b.counts["sent"]
        await wait_until(lambda: b.counts["sent"] > before + 20, "twenty intervals passed")
        assert b.link("a-1") is not None
        got = [(await received(b))[1] for _ in range(10)]
        assert got == [a_message(str(number)) for number in range(10)]


async def test_a_peer_that_does_not_read_fills_its_link_which_goes_down() -> None:
    small = dataclasses.replace(CALM, high_water_mark=10)
    listener = zmq.Context()
    raw = listener.socket(zmq.ROUTER)
    raw.setsockopt(zmq.RCVHWM, 10)
    lock(raw, listens=True)
    port = raw.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with buses("a-1", settings=small) as (a,):
            a.connect("b-1", f"tcp://127.0.0.1:{port}")

            def flood() -> None:
                for _ in range(10_000):
                    a.send("b-1", a_message("x" * 10_000))

            with pytest.raises(LinkLost, match="full"):
                flood()
            assert (await until_down(a)).reason is Down.FULL
            assert a.link("b-1") is None
    finally:
        raw.close(linger=0)
        listener.term()


async def test_garbage_is_counted_and_does_no_harm() -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.ROUTING_ID, b"x-1/link")
    lock(raw)
    anonymous = context.socket(zmq.DEALER)
    anonymous.setsockopt(zmq.LINGER, 0)
    lock(anonymous)
    try:
        async with buses("a-1") as (a,):
            raw.connect(a.endpoint)
            anonymous.connect(a.endpoint)
            anonymous.send_multipart([encode(Beat("x-1", 0, False))])
            raw.send_multipart([encode(Open("x-1", "a-1"))])
            for frames in (
                [b""],
                [b"\x00" * 100],
                [b"", b"", b""],
                [encode(a_message())[:-1]],
                [encode(a_message()), b"more"],
            ):
                raw.send_multipart(frames)
            raw.send_multipart([encode(a_message())])
            assert await received(a) == ("x-1", a_message())
            await wait_until(lambda: a.counts["malformed"] == 5, "all five are counted")
            await wait_until(lambda: a.counts["late"] == 1, "what nobody opened is no link")
            raw.send_multipart([encode(Beat("somebody-else", 0, False))])
            assert (await until_down(a)).reason is Down.IMPOSTOR
            raw.send_multipart([encode(a_message("late"))])
            await wait_until(lambda: a.counts["late"] == 2, "the late message is counted")
    finally:
        raw.close()
        anonymous.close()
        context.term()


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    async with buses("a-1") as (a,):
        port = int(a.endpoint.rpartition(":")[2])
        with pytest.raises(ResourceError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            await Bus("b-1", bus_settings(port=port)).start()


def a_key() -> str:
    return zmq.curve_keypair()[1].decode()


async def test_only_those_who_have_the_key_get_in() -> None:
    wrong = dataclasses.replace(CALM, secret_key=a_key())
    async with buses("a-1", "b-1") as (a, b), buses("c-1", settings=wrong) as (stranger,):
        a.connect("b-1", b.endpoint)
        a.send("b-1", a_message())
        assert await received(b) == ("a-1", a_message())
        stranger.connect("b-1", b.endpoint)
        stranger.send("b-1", a_message("let me in"))
        assert (await until_down(stranger)).reason is Down.UNREACHABLE
        a.send("b-1", a_message("again"))
        assert (await received(b))[1] == a_message("again")
        assert b.peers() == {"a-1"}


@pytest.mark.parametrize("listens", [False, True])
async def test_a_process_without_any_key_is_neither_heard_nor_told_anything(listens: bool) -> None:
    """Whoever can reach the port, and speaks the protocol: it does not get as far."""
    context = zmq.Context()
    raw = context.socket(zmq.ROUTER if listens else zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    raw.setsockopt(zmq.ROUTING_ID, b"b-1/link")
    try:
        async with buses("a-1") as (a,):
            if listens:
                port = raw.bind_to_random_port("tcp://127.0.0.1")
                a.connect("b-1", f"tcp://127.0.0.1:{port}")
                a.send("b-1", a_message("for b only"))
                assert (await until_down(a)).reason is Down.UNREACHABLE
            else:
                raw.connect(a.endpoint)
                for message in (Open("b-1", "a-1"), a_message("from b, it says")):
                    raw.send(encode(message))
                async with buses("c-1") as (c,):  # whose word comes after it, and is heard
                    c.connect("a-1", a.endpoint)
                    c.send("a-1", a_message())
                    assert await received(a) == ("c-1", a_message())
                assert "b-1" not in a.peers()
            assert not raw.poll(0)
    finally:
        raw.close()
        context.term()


async def test_the_servers_public_key_alone_opens_nothing() -> None:
    secret = a_key()
    keyed = dataclasses.replace(CALM, secret_key=secret)
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    public, own_secret = zmq.curve_keypair()
    raw.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(secret.encode()))
    raw.setsockopt(zmq.CURVE_PUBLICKEY, public)
    raw.setsockopt(zmq.CURVE_SECRETKEY, own_secret)
    raw.setsockopt(zmq.ROUTING_ID, b"x-1/link")
    monitor = raw.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED)
    try:
        async with buses("b-1", settings=keyed) as (b,):
            raw.connect(b.endpoint)
            raw.send(encode(Open("x-1", "b-1")))
            await wait_until(lambda: bool(monitor.poll(0)), "it is refused")
            assert b.peers() == set()
            assert b.counts["received"] == 0
    finally:
        raw.disable_monitor()
        monitor.close(linger=0)
        raw.close()
        context.term()


async def test_a_bus_without_a_key_does_not_start() -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        await Bus("a-1", BusSettings()).start()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_a_key_of_its_own_nothing_but_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        BusSettings(host=host)
    assert BusSettings(host=host, secret_key=a_key()).host == host


async def test_a_key_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        await Bus("a-1", BusSettings(secret_key="~" * 40)).start()


async def test_a_bus_leaves_no_descriptor_behind() -> None:
    import psutil

    process = psutil.Process()
    async with buses("warm-1", "warm-2") as (a, b):
        a.connect("warm-2", b.endpoint)
        await until_up(a)
    before = process.num_fds()
    for _ in range(5):
        async with buses("a-1", "b-1") as (a, b):
            a.connect("b-1", b.endpoint)
            b.connect("a-1", a.endpoint)
            a.send("b-1", Cancel("a-1", "r", 1, "over"))
            b.send("a-1", Release(HandoffKey("l", "r", 1, 0)))
            await received(a)
            await received(b)
    assert process.num_fds() <= before
