"""Who may say what: every kind of message, so that a new one cannot be forgotten."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.settings.config import BusSettings
from common.wire.bus_links import Link, LinkTable
from common.wire.codec import decode
from common.wire.message import (
    GatewayMessage,
    HandoffMessage,
    LinkMessage,
    Message,
    NodeMessage,
    PeerMessage,
    TransportMessage,
)
from common.wire.messages import MESSAGES, Beat, Dispatch, Open, Over, TookOver
from common.wire.senders import TO_GATEWAYS, TO_NODES
from tests.unit.test_codec import MESSAGE

NAMES = ("node", "gateway")


class Wire:
    """Notes what is put on it."""

    def __init__(self) -> None:
        self.said: list[Message] = []

    def put(self, link: Link, frame: bytes) -> None:
        self.said.append(decode(frame))

    def hang_up(self, link: Link) -> None: ...


def linked(hears: Any) -> tuple[LinkTable, Wire]:
    """A table with one link, that `peer` opened."""
    wire = Wire()
    table = LinkTable("me", BusSettings(), wire, progress=lambda: (0, False), say=lambda _: None, hears=hears)
    table.heard(b"peer/1", Open("peer", "me"), 0.0)
    return table, wire


def named(message: Message, name: str) -> Message:
    """The message, said in this name, where it says one."""
    fields = {field.name for field in dataclasses.fields(message)} & set(NAMES)
    return dataclasses.replace(message, **dict.fromkeys(fields, name))


def in_whose_name(message: Message) -> str | None:
    """Who says it, by the message itself; an Offer's gateway is the request's, not the speaker."""
    said = getattr(message, "gateway" if isinstance(message, GatewayMessage) else "node", None)
    return None if said is None else str(said)


def test_every_message_says_by_its_base_who_says_it_to_whom() -> None:
    bases = (NodeMessage, GatewayMessage, LinkMessage, HandoffMessage, TransportMessage, PeerMessage)
    unplaced = [kind for kind in MESSAGES.values() if not issubclass(kind, bases)]
    assert unplaced == [Dispatch], "it lies in Redis"


@given(message=MESSAGE, to_gateway=st.booleans())
def test_only_what_is_for_us_and_in_the_peers_own_name_is_heard(message: Message, to_gateway: bool) -> None:
    hears = TO_GATEWAYS if to_gateway else TO_NODES
    for name in ("peer", "somebody-else"):
        table, _ = linked(hears)
        said = named(message, name)
        heard = table.heard(b"peer/1", said, 1.0)
        own = in_whose_name(said) in (None, "peer") or isinstance(message, TookOver)
        assert (heard is not None) == (isinstance(message, hears) and own)
        if heard is None and not isinstance(message, PeerMessage):
            assert table.counts["refused"] == 1
            assert [link.address for link in table] == [b"peer/1"], "the link goes on"


@given(message=MESSAGE)
def test_a_link_begins_with_open_in_the_openers_own_name(message: Message) -> None:
    table, wire = linked(TO_NODES)
    before = len(wire.said)
    assert table.heard(b"stranger/1", message, 1.0) is None
    assert not table.with_peer("stranger")
    table.heard(b"stranger/1", Open("peer", "me"), 1.0)
    assert not table.with_peer("stranger")
    assert all(isinstance(said, (Beat, Over)) for said in wire.said[before:])
