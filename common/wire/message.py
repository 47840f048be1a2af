"""What a message is: a frozen dataclass with a number on the wire, of a base that says who says it to whom.

Owns the bases, the names that they share, and the register of all messages. The messages themselves are
in messages.py.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import ClassVar, TypeVar


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    kind: ClassVar[int]


NUMBERED: dict[int, type[Message]] = {}
"""The messages that were made so far, by number."""

M = TypeVar("M", bound=Message)


@typing.dataclass_transform(frozen_default=True)
def message(kind: int) -> Callable[[type[M]], type[M]]:
    """Make a class a message with this number on the wire, which is never used again for another."""

    def make(cls: type[M]) -> type[M]:
        made = dataclasses.dataclass(frozen=True, slots=True)(cls)
        made.kind = kind
        assert NUMBERED.setdefault(kind, made) is made, f"{kind} is taken"
        return made

    return make


@dataclasses.dataclass(frozen=True, slots=True)
class NodeMessage(Message):
    """node → gateway. `node` is the incarnation that says it."""

    node: str


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayMessage(Message):
    """gateway → node. `gateway` is the incarnation that says it."""

    gateway: str


@dataclasses.dataclass(frozen=True, slots=True)
class LinkMessage(Message):
    """Between two nodes, about the KV link that it names; whose id is new at each reconnect."""

    link: str


@dataclasses.dataclass(frozen=True, slots=True)
class HandoffKey:
    """Names one handoff. A new link is a new handoff, even of the same attempt, and so is a new ask:
    `ask` numbers, from 1, the handoffs in which one node offers a choice of an attempt: one that was
    refused is asked for again under the next number, which no old answer is about."""

    link: str
    request: str
    attempt: int
    choice: int
    ask: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class HandoffMessage(Message):
    """Between the two ends of one handoff."""

    key: HandoffKey

    @property
    def link(self) -> str:
        return self.key.link


@dataclasses.dataclass(frozen=True, slots=True)
class TransportMessage(Message):
    """Between the two ends of one KV link, over a socket of its transport."""

    link: str


@dataclasses.dataclass(frozen=True, slots=True)
class PeerMessage(Message):
    """Between the two ends of any link of the bus, about that link. `node` is the incarnation, of a
    node or a gateway, that says it."""

    node: str
