"""Passes what the bus brings to the parts of a node: messages, and links that come up or end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from common.node.cache_feed import CacheFeed
from common.node.gateways import Gateways
from common.node.peers import Peers
from common.node.ports import NodeRole
from common.wire.bus import Bus, Down
from common.wire.message import HandoffMessage, LinkMessage
from common.wire.messages import CacheQuery, Cancel, HoldsQuery, TokensAck
from kv_transfer.link import Links

SLOW_DEATHS = frozenset({Down.SILENT, Down.STALLED, Down.UNREACHABLE})  # a node finds them out by waiting


async def listen(
    bus: Bus,
    links: Links,
    gateways: Gateways,
    cache_feed: CacheFeed,
    role: NodeRole,
    wake: Callable[[], None],
) -> NoReturn:
    """Pass on every message, until cancelled."""
    while True:
        received = await bus.receive()
        peer, message = received.peer, received.message
        if isinstance(message, (LinkMessage, HandoffMessage)):
            links.receive(peer, received.link, message)
        elif isinstance(message, TokensAck):
            gateways.acknowledged(peer, message)
        elif isinstance(message, HoldsQuery):
            gateways.asked(peer, message)
        elif isinstance(message, CacheQuery):
            gateways.send(peer, cache_feed.content())
        elif isinstance(message, Cancel):
            gateway, request, attempt = message.gateway, message.request, message.attempt
            choices = frozenset(message.choices)
            gateways.tokens.forget(gateway, request, attempt, choices)
            role.cancel(gateway, request, attempt, message.reason, choices)
            wake()


async def watch(
    bus: Bus, links: Links, gateways: Gateways, peers: Peers, wake: Callable[[], None]
) -> NoReturn:
    """Say who came and who went, until cancelled. A connection that ends takes its KV links along."""
    while True:
        event = await bus.next_event()
        if event.up:
            peers.linked(event.peer)
            gateways.linked(event.peer)
            continue
        if event.reason in SLOW_DEATHS and bus.link(event.peer) is None:
            peers.waited_in_vain(event.peer)
        links.connection_lost(event.link)
        gateways.unlinked(event.peer)
        wake()
