"""Each rule of common/README.md, "Links" and "Streams of tokens", taken out: schedules must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from common.node.gateways import Gateways
from common.node.token_stream import TokenStream
from common.wire.bus_links import LinkTable
from common.wire.message import Message
from common.wire.messages import Open
from gateway.holders import Holders
from gateway.node_links import NodeLinks
from gateway.streams import ChoiceStream
from tests.support.streams.system import Schedule

_from_unknown = LinkTable._from_unknown


def _open_only(self: LinkTable, address: bytes, message: Message, now: float) -> None:
    if isinstance(message, Open):
        _from_unknown(self, address, message, now)


def _nothing(*_: Any, **__: Any) -> None: ...


MUTATIONS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "what comes of no link is not answered": (LinkTable, "_from_unknown", _open_only),
    "a node says nothing again on a new link": (Gateways, "linked", _nothing),
    "a node sends nothing again": (TokenStream, "resend", lambda *_: False),
    "a node never gives a gateway up": (Gateways, "_give_up", _nothing),
    "a gateway never asks": (Holders, "_ask", _nothing),
    "a gateway asks on new links only": (Holders, "look", _nothing),
    "a gateway acknowledges what is still missing": (ChoiceStream, "acknowledged", lambda self, run: run.end),
    "a gateway takes the end of a link for nothing": (NodeLinks, "_link_ended", _nothing),
}


@contextmanager
def without(rule: str) -> Iterator[None]:
    cls, name, instead = MUTATIONS[rule]
    with mock.patch.object(cls, name, instead):
        yield


def noticed(rule: str, schedules: int) -> int | None:
    """The first seed under which the lack of this rule shows."""
    with without(rule):
        for seed in range(schedules):
            try:
                Schedule(seed).run()
            except Exception:
                return seed
    return None
