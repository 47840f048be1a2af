"""Links whose transports fail in ways that nobody thought of, stand still, or are not chosen."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from common.errors import LinkLost, PdqError, TransportFailed
from common.wire.messages import Pull
from kv_transfer.ports import Adopted, Ended, Outcome
from kv_transfer.transports.base import Reader, Source
from kv_transfer.transports.shm import ShmReader
from kv_transfer.transports.tcp import ServedLink, TcpReader, TcpSource
from tests.support.holdings import holdings
from tests.support.redis import wait_until
from tests.unit.kv_transfer.test_kv_links import SETTINGS, Node, Prompt, Wires

FOREIGN = [OSError, RuntimeError, MemoryError, KeyError, asyncio.CancelledError]
PATIENT = dataclasses.replace(SETTINGS, answer=60.0)  # whoever waited for an answer would fail
foreign_errors = pytest.mark.parametrize("error", FOREIGN)


@contextlib.asynccontextmanager
async def nodes(*names: str, transport: str = "") -> AsyncIterator[tuple[Node, ...]]:
    """All of them with shm and tcp, or the one that is named; afterwards nothing of them is left."""
    before = descriptors()
    wires = Wires()
    made = [Node(wires, name, transport, settings=PATIENT) for name in names]
    try:
        yield tuple(made)
    finally:
        for node in made:
            await node.links.close()
            assert not any(node.leases.count().values())
            assert not node.links.intakes()
            node.memory.close()
    assert not {t.name for t in threading.enumerate()} & {"tcp-source", "kv-source"}
    assert descriptors() <= before


def descriptors() -> Counter[str]:
    """But for pools', whose mappings end with the tensors over them."""
    held = holdings(os.getpid()).descriptors
    del held["memfd"]
    return held


def failing_once(
    patch: pytest.MonkeyPatch, where: object, name: str, error: type[BaseException]
) -> list[str]:
    """Make a method raise at its next call; the names of the threads that called it."""
    original, called = getattr(where, name), []

    def failing(*arguments: Any, **named: Any) -> Any:
        called.append(threading.current_thread().name)
        if len(called) == 1:
            raise error("foreign")
        return original(*arguments, **named)

    patch.setattr(where, name, failing)
    return called


async def arrives(p: Node, d: Node, link: str, name: str) -> None:
    prompt = Prompt(p, name, 10)
    key = prompt.offer(link)
    prompt.compute(key, 0, prompt.count)
    prompt.finish(key)
    await p.until(lambda: Ended(key, True, Outcome.ADOPTED, "") in p.sent)
    adopted = next(e for e in d.received if isinstance(e, Adopted) and e.key == key)
    assert prompt.arrived(adopted, d)
    await p.quiet()


@foreign_errors
@pytest.mark.parametrize("end", ["source", "reader"])
async def test_a_transport_that_cannot_be_opened_costs_a_link_its_place_and_no_time(
    end: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes("p", "d") as (p, d):
        if end == "source":
            failing_once(monkeypatch, p.links._ends._sources[0], "open_link", error)
        else:
            openers = d.links._ends._openers
            holder = Openers(openers["shm"])
            failing_once(monkeypatch, holder, "shm", error)
            openers["shm"] = lambda *arguments: holder.shm(*arguments)
        link = await p.links.open("d")
        (row,) = p.links.describe()
        assert row["transport"] == "tcp"
        assert error.__name__ in row["reason"]
        await arrives(p, d, link, "r")


class Openers:
    def __init__(self, shm: Callable[..., Reader]) -> None:
        self.shm = shm


@pytest.mark.parametrize("when", ["still opening", "just welcomed"])
async def test_a_link_that_nobody_waits_for_any_more_is_closed_at_both_ends(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes("p", "d", transport="shm") as (p, d):
        given_up, closed = threading.Event(), list[Reader]()
        with monkeypatch.context() as patch:
            patch.setattr(p.links._ends, "_settings", dataclasses.replace(PATIENT, answer=0.5))
            patch.setattr(ShmReader, "close", closing(closed, ShmReader.close))

            def slow(*arguments: Any) -> Reader:
                reader = ShmReader.open(*arguments)
                assert when != "still opening" or given_up.wait(10)
                return reader

            patch.setitem(d.links._ends._openers, "shm", slow)
            if when == "just welcomed":  # and Welcome is on its way
                patch.setattr(p.links._ends, "_receive_answer", lambda *_: None)
            with pytest.raises(LinkLost, match="does not answer"):
                await p.links.open("d")
            given_up.set()
            await wait_until(lambda: bool(closed), "the reader is closed")
            await d.until_settled()
            assert p.links.describe() == d.links.describe() == []
            assert len(closed) == 1
        await arrives(p, d, await p.links.open("d"), "r")


def closing(closed: list[Reader], close: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(reader: Any) -> None:
        closed.append(reader)
        close(reader)

    return counted


@foreign_errors
async def test_an_answer_that_fails_as_a_whole_is_a_refusal_and_no_silence(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes("p", "d") as (p, d):
        with monkeypatch.context() as patch:
            patch.setattr("kv_transfer.handshake._compare", raising(error))
            with pytest.raises(PdqError, match=error.__name__):
                await p.links.open("d")
        await arrives(p, d, await p.links.open("d"), "r")


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error("foreign")

    return fail


@foreign_errors
async def test_a_pull_that_fails_fails_its_prompt_and_the_next_goes_another_way(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes("p", "d") as (p, d):
        link = await p.links.open("d")
        failing_once(monkeypatch, d.links._ends._ends[link].reader, "pull", error)
        prompt = Prompt(p, "first", 10)
        key = prompt.offer(link)
        prompt.compute(key, 0, prompt.count)
        prompt.finish(key)
        await p.until(lambda: p.sent and isinstance(p.sent[-1], Ended))
        assert p.sent[-1].outcome in (Outcome.FAILED, Outcome.LINK_LOST)
        assert d.links.counts[TransportFailed.code] == 1
        await p.quiet()
        await d.quiet()
        p.links._ends._bus.wires.cuts.clear()  # type: ignore[attr-defined]  # they meet again
        link = await p.links.open("d")
        (row,) = p.links.describe()
        assert row["transport"] == "tcp"
        assert "it failed before" in row["reason"]
        await arrives(p, d, link, "second")


async def test_a_transport_that_failed_is_taken_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes("p", "d", transport="tcp") as (p, d):
        link = await p.links.open("d")
        failing_once(monkeypatch, d.links._ends._ends[link].reader, "pull", RuntimeError)
        prompt = Prompt(p, "first", 10)
        prompt.compute(prompt.offer(link), 0, prompt.count)
        await p.until(lambda: p.sent and isinstance(p.sent[-1], Ended))
        p.links._ends._bus.wires.cuts.clear()  # type: ignore[attr-defined]
        await arrives(p, d, await p.links.open("d"), "second")


@foreign_errors
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("end", ["source", "reader"])
async def test_an_end_that_cannot_be_closed_at_once_leaves_nothing(
    end: str, transport: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nodes` looks at what is left."""
    async with nodes("p", "d", transport=transport) as (p, d):
        link = await p.links.open("d")
        prompt = Prompt(p, "r", 10)
        prompt.compute(prompt.offer(link), 0, 1)
        await p.until(lambda: p.sent)
        if end == "source":
            (source,) = p.links._ends._sources
            closed = failing_once(monkeypatch, source, "close_link", error)
        else:
            closed = failing_once(monkeypatch, d.links._ends._ends[link].reader, "close", error)
        p.links._ends._bus.disconnect("d")
        await p.until(lambda: isinstance(p.sent[-1], Ended))
        await p.quiet()
        await d.quiet()
        await p.until_settled()
        await d.until_settled()
        assert len(closed) == 2
        assert set(d.pool.references) == {0}


async def test_what_is_not_chosen_is_never_opened_and_what_is_refused_is_closed() -> None:
    async with nodes("p", "d") as (p, d):
        await p.links.open("d")
        _, tcp = p.links._ends._sources
        assert isinstance(tcp, TcpSource)
        assert tcp._served == {}
    async with nodes("p", "d") as (p, d):
        shm, tcp = p.links._ends._sources
        assert isinstance(tcp, TcpSource)
        d.links._ends._openers["shm"] = raising(LinkLost)
        await p.links.open("d")
        assert p.links.describe()[0]["transport"] == "tcp"
        assert len(tcp._served) == 1
        await p.until_settled()
        assert shm._links == {}  # type: ignore[attr-defined]


async def test_transports_are_opened_and_closed_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """nixl registers the whole pool, CURVE makes threads."""
    called: dict[str, str] = {}

    def noted(where: object, name: str) -> None:
        original = getattr(where, name)

        def note(*arguments: Any) -> Any:
            called[name] = threading.current_thread().name
            return original(*arguments)

        monkeypatch.setattr(where, name, note)

    async with nodes("p", "d", transport="tcp") as (p, d):
        source = p.links._ends._sources[0]
        for name in ("open_link", "close_link"):
            noted(source, name)
        noted(TcpReader, "_prove_link")
        noted(TcpReader, "pull")
        await arrives(p, d, await p.links.open("d"), "r")
    assert {name: thread.partition("_")[0] for name, thread in called.items()} == {
        "open_link": "kv-open",
        "_prove_link": "kv-open",
        "pull": "kv-copy",
        "close_link": "kv-close",
    }


async def test_whoever_opens_at_the_same_time_gets_the_same_link_and_may_go_away() -> None:
    async with nodes("p", "d") as (p, _):
        first, second = (asyncio.create_task(p.links.open("d")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        link = await second
        assert await p.links.open("d") == link
        assert len(p.links.describe()) == 1
        with pytest.raises(asyncio.CancelledError):
            await first


@contextlib.contextmanager
def stalled(source: Source) -> Any:
    """The source hears what it is asked for, and sends nothing until the end."""
    going_on, asked = threading.Event(), threading.Event()
    original = ServedLink._send_slabs

    def ship(served: ServedLink, peer: bytes, pull: Pull) -> None:
        if served._memory is source.memory and pull.slots:  # type: ignore[attr-defined]
            asked.set()
            going_on.wait(60)
        original(served, peer, pull)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServedLink, "_send_slabs", ship)
        try:
            yield asked
        finally:
            going_on.set()


async def test_a_peer_that_stands_still_holds_up_no_other() -> None:
    """However many prompts it has under way: more than one peer's copies, or all that run at once
    before, would need."""
    async with nodes("slow", "fast", "d", transport="tcp") as (slow, fast, d):
        with stalled(slow.links._ends._sources[0]) as asked:
            link = await slow.links.open("d")
            prompts = [Prompt(slow, f"s{n}", 4) for n in range(4)]
            keys = [prompt.offer(link) for prompt in prompts]
            for prompt, key in zip(prompts, keys, strict=True):
                prompt.compute(key, 0, 1)
                prompt.finish(key)
            await slow.until(lambda: len(slow.sent) == len(prompts))
            assert await asyncio.to_thread(asked.wait, 10)
            await arrives(fast, d, await fast.links.open("d"), "f")
            assert all(key in d.links.intakes() for key in keys)
        await slow.until(lambda: sum(isinstance(e, Ended) for e in slow.sent) == len(prompts))
        assert {e.outcome for e in slow.sent if isinstance(e, Ended)} == {Outcome.ADOPTED}


async def test_a_copy_that_takes_too_long_ends_with_its_link() -> None:
    """However little arrives of it, and whatever it says meanwhile."""
    async with nodes("slow", "d", transport="tcp") as (slow, d):
        d.links._ends._settings = dataclasses.replace(PATIENT, copy=0.05)
        with stalled(slow.links._ends._sources[0]):
            link = await slow.links.open("d")
            prompt = Prompt(slow, "s", 4)
            prompt.compute(prompt.offer(link), 0, 1)
            await slow.until(lambda: slow.sent and isinstance(slow.sent[-1], Ended))
            assert slow.sent[-1].outcome is Outcome.LINK_LOST
            await d.quiet()
            assert set(d.pool.references) == {0}
