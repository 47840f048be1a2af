"""Who may say what: the first thing that a message is held against, before anything acts on it.

Every kind of message has its place in one of the groups below, by who says it to whom. Whoever names
itself in a message must be the peer at the other end of the link that brings it, which has the key of
the system; `TookOver` alone may be said of another node, by the one that it took over from.

What the owner of a request, or of a link, has to check further is its own: gateway/speakers.py
for choices, node/gateways.py and the roles for the requests of a gateway, kv_transfer/link.py for
handoffs.
"""

from __future__ import annotations

from common.wire.messages import (
    Abort,
    Ack,
    Beat,
    Blocks,
    CacheContent,
    CacheEvents,
    CacheQuery,
    Cancel,
    Closed,
    Commit,
    Deny,
    Dispatch,
    Failed,
    Goodbye,
    Grant,
    Hello,
    HoldsQuery,
    Message,
    Offer,
    Open,
    Over,
    Proved,
    Pull,
    Refuse,
    Release,
    Slabs,
    Stage,
    Tail,
    Tokens,
    TokensAck,
    TookOver,
    Welcome,
)

Kinds = tuple[type[Message], ...]

FROM_NODES: Kinds = (Tokens, TookOver, Stage, Failed, CacheEvents, CacheContent)
FROM_GATEWAYS: Kinds = (TokensAck, HoldsQuery, Cancel, CacheQuery)
BETWEEN_NODES: Kinds = (
    Hello,
    Welcome,
    Refuse,
    Closed,
    Offer,
    Grant,
    Deny,
    Blocks,
    Tail,
    Commit,
    Ack,
    Abort,
    Release,
)
ABOUT_LINKS: Kinds = (Open, Beat, Over, Goodbye)
"""Between any two ends; bus_links.py has their rules."""
NOT_OVER_LINKS: Kinds = (Dispatch, Pull, Slabs, Proved)
"""Through Redis, or over the sockets of tcp."""

TO_GATEWAYS, TO_NODES = FROM_NODES, FROM_GATEWAYS + BETWEEN_NODES

_SAID_OF_ANOTHER: Kinds = (TookOver,)


def is_own_word(peer: str, message: Message) -> bool:
    """Whether who says it, by the message itself, is the peer that it came from."""
    if isinstance(message, _SAID_OF_ANOTHER):
        return True
    named = getattr(message, "gateway" if isinstance(message, FROM_GATEWAYS) else "node", peer)
    return bool(named == peer)
