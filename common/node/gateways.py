"""Keeps what a node owes to gateways, also while a gateway has no link.

Owns the unacknowledged tokens, the last word about each choice that has ended here, and how long the node
waits for a gateway without a link. Asks the role (`Attempts`) about requests. The rules are in
common/README.md, "Streams of tokens".

    linked ──the last link ends──▶ waited for ────`grace_s`────▶ given up: all of it is freed here
       ▲                               │                                   │
       └─────────── a link ────────────┴───────────────────────────────────┘
       says again what runs, and what is not acknowledged; answers what the gateway asks
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

from common.errors import LinkLost, NotHeld, PdqError
from common.logs import get_logger
from common.node.token_stream import ChoiceKey, TokenStream
from common.wire.message import Message
from common.wire.messages import Failed, HoldsQuery, Stage, TokensAck, TookOver

log = get_logger("gateways")

LAST_WORDS = 4096  # about choices that have ended here


class Sending(Protocol):
    """The part of the bus (common/wire/bus.py) that gateways are spoken to with."""

    def send(self, peer: str, message: Message) -> None: ...

    def link(self, peer: str) -> str | None: ...


class Attempts(Protocol):
    """The part of the role (`NodeRole`) that `Gateways` calls."""

    def holds(self, key: ChoiceKey) -> bool:
        """Whether this choice is computed here, or on its way elsewhere."""
        ...

    def gateway_linked(self, gateway: str) -> None: ...

    def gateway_lost(self, gateway: str) -> None: ...


class Gateways:
    """All gateways of one node. Its owner reports every link that comes up or ends."""

    attempts: Attempts  # to be set before there is a link

    grace_s = 3.0  # for a gateway's link to come back before its requests are freed

    def __init__(self, node: str, bus: Sending) -> None:
        self._node, self._bus = node, bus
        self.tokens = TokenStream(node, self.send)
        self._waiting: dict[str, asyncio.TimerHandle] = {}  # without a link, until given up
        self._last_words: OrderedDict[ChoiceKey, Failed | TookOver] = OrderedDict()

    def send(self, gateway: str, message: Message) -> None:
        """Send a message, or drop it: the next link says again what matters. Without a link, the time
        that the gateway has for a new one begins."""
        try:
            self._bus.send(gateway, message)
        except LinkLost:
            log.info("message.dropped", peer=gateway, kind=type(message).__name__)
            self._wait_for(gateway)

    def stage(
        self, gateway: str, key: ChoiceKey, state: str, seconds: dict[str, float], cached: int = 0
    ) -> None:
        """Say that a choice is in this state now."""
        self.send(gateway, Stage(self._node, *key, state, seconds, cached))

    def fail(self, gateway: str, key: ChoiceKey, error: PdqError, *, retryable: bool) -> None:
        """Say that this attempt is over here."""
        log.warning("attempt.failed", request=key.request, attempt=key.attempt, error=error)
        self.end(gateway, Failed(self._node, *key, error.code, str(error), retryable))

    def end(self, gateway: str, word: Failed | TookOver) -> None:
        """Say how a choice ended here; it is said again to a gateway that asks for it."""
        key = ChoiceKey(word.request, word.attempt, word.choice)
        self._last_words[key] = word
        self._last_words.move_to_end(key)
        if len(self._last_words) > LAST_WORDS:
            self._last_words.popitem(last=False)
        self.send(gateway, word)

    # Links.

    def linked(self, gateway: str) -> None:
        """A link came up, or one of two has ended: repeat everything that may have been lost. What was
        not lost does no harm."""
        timer = self._waiting.pop(gateway, None)
        if timer is not None:
            timer.cancel()
        self.attempts.gateway_linked(gateway)
        self.tokens.resend(gateway)

    def unlinked(self, gateway: str) -> None:
        """A link has ended."""
        if self._bus.link(gateway) is None:
            self._wait_for(gateway)
        else:
            self.linked(gateway)

    def _wait_for(self, gateway: str) -> None:
        if gateway not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[gateway] = loop.call_later(self.grace_s, self._give_up, gateway)

    def _give_up(self, gateway: str) -> None:
        del self._waiting[gateway]
        if self._bus.link(gateway) is None:  # else that one decides
            self.attempts.gateway_lost(gateway)
            self.tokens.forget_gateway(gateway)

    def close(self) -> None:
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()

    # What gateways say.

    def acknowledged(self, gateway: str, message: TokensAck) -> None:
        for request, attempt, choice, below in message.acks:
            self.tokens.acknowledge(gateway, ChoiceKey(request, attempt, choice), below)

    def asked(self, gateway: str, query: HoldsQuery) -> None:
        """Answer for each choice of which this node has nothing more to say."""
        for request, attempt, choice, below in query.choices:
            key = ChoiceKey(request, attempt, choice)
            self.tokens.acknowledge(gateway, key, below)
            if self.tokens.resend(gateway, key) or self.attempts.holds(key):
                continue
            word = self._last_words.get(key)
            if word is None or (isinstance(word, TookOver) and word.position > below):
                error = NotHeld("this node has nothing of it")
                word = Failed(self._node, *key, error.code, error.message, True)
            log.info("choice.not_held", gateway=gateway, request=request, answer=type(word).__name__)
            self.send(gateway, word)
