"""Who may say what: the first thing that a message is held against, before anything acts on it.

The base of a message says who says it to whom. Whoever names itself in a message must be the peer at
the other end of the link that brings it, which has the key of the system; `TookOver` alone may be said
of another node, by the one that it took over from.

What the owner of a request, or of a link, has to check further is its own: gateway/speakers.py
for choices, node/gateways.py and the roles for the requests of a gateway, kv_transfer/link.py for
handoffs.
"""

from __future__ import annotations

from common.wire.message import GatewayMessage, HandoffMessage, LinkMessage, Message, NodeMessage
from common.wire.messages import TookOver

Kinds = tuple[type[Message], ...]

TO_GATEWAYS: Kinds = (NodeMessage,)
TO_NODES: Kinds = (GatewayMessage, LinkMessage, HandoffMessage)


def is_own_word(peer: str, message: Message) -> bool:
    """Whether who says it, by the message itself, is the peer that it came from."""
    if isinstance(message, TookOver):
        return True
    name = "gateway" if isinstance(message, GatewayMessage) else "node"
    return bool(getattr(message, name, peer) == peer)
