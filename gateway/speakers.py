"""Whose messages about a choice count.

A node has the system's key, a link, and a record in the registry (strangers.py holds back messages of
others). Beyond that, what it says about a choice counts only if it may have that choice:

    nobody has spoken of it yet     any node that could compute it: its queue entry may have moved
    a node has it                   that one, and earlier holders in the attempt
    a node takes it over            the holder says so (`TookOver`); the new node's own word counts
                                    only if the gateway chose it, as the decode node of the
                                    dispatch, or if it had the choice before
    an older attempt                whoever may have had it; nothing follows but that it is stopped

A refused message is counted and logged, and changes nothing. Messages travel over several links, so one
of another node, still on its way, may explain it. That is why a message of a node that could compute the
choice is kept, and heard again once the choice has moved (`Choice.early`). If it was true for another
reason, the node says it again when it is asked (holders.py). A node that was refused is told when the
attempt, or the request, is over, because it may keep something for us.
"""

from __future__ import annotations

from common.logs import get_logger
from common.wire.message import Message
from gateway.metrics import GatewayMetrics
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeDirectory

MAX_EARLY = 256  # messages about one choice

log = get_logger("speakers")


class Speakers:
    """Ask it before acting on a message."""

    def __init__(self, directory: NodeDirectory, metrics: GatewayMetrics) -> None:
        self._directory = directory
        self._metrics = metrics

    def heeds(self, node: str, request: OpenRequest, choice: Choice, attempt: int) -> bool:
        """Whether a message of `node` about this attempt counts."""
        current = choice.stream.attempt
        if attempt == current and choice.heard:
            return node in choice.speakers
        if attempt <= current:
            return node in request.involved or self._could_compute(node, request)
        return False

    def heeds_taking_over(
        self, node: str, taker: str, request: OpenRequest, choice: Choice, attempt: int
    ) -> bool:
        """Whether a message of `node` counts which says that `taker` holds the choice now."""
        if self.heeds(node, request, choice, attempt):
            return True
        if attempt != choice.stream.attempt or node != taker:
            return False
        if choice.done:  # it is told to stop
            return self._could_compute(node, request)
        sent = request.dispatches.get(attempt)
        chosen = sent is not None and node == sent[1].decode_node
        return chosen and choice.heard and not choice.held_from

    def refuse(self, message: Message, node: str, request: OpenRequest, choice: Choice, attempt: int) -> None:
        """Keep a message that another node's may still explain, and count any other."""
        request.refused.add(node)
        of_now = attempt == choice.stream.attempt
        if of_now and len(choice.early) < MAX_EARLY and self._could_compute(node, request):
            choice.early.append((node, message))
        else:
            self._count(message, node, request)

    def unexplained(self, request: OpenRequest, choice: Choice) -> None:
        """Count the messages that were kept, now that the attempt is over."""
        for node, message in choice.early:
            self._count(message, node, request)
        choice.early.clear()

    def _could_compute(self, node: str, request: OpenRequest) -> bool:
        """Whether the registry names the node, and it would give the same tokens."""
        return request.fingerprint is not None and any(
            view.incarnation == node and request.fingerprint.mismatch(view.fingerprint) is None
            for view in self._directory.nodes()
        )

    def _count(self, message: Message, node: str, request: OpenRequest) -> None:
        kind = type(message).__name__
        self._metrics.refused_words.labels(kind).inc()
        log.warning("word.refused", node=node, kind=kind, request=request.id)
