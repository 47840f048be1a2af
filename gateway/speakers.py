"""Whose word about a choice counts.

A node has the system's key, a link, and a record in the registry (strangers.py holds up what others
say). Beyond that, what it says of a choice counts only if it may have that choice:

    nobody has spoken of it yet     any node that could compute it: its queue entry may have moved
    a node has it                   that one, and former ones of the attempt
    a node that is to take it over  the one that has it says so (`TookOver`); by its own word only if
                                    the gateway chose it, as the decode node of the dispatch, or if
                                    it had the choice before
    an older attempt                whoever may have had it; nothing follows but that it is stopped

What is refused is counted and logged, and changes nothing. Words travel on several links: what a node
says that could compute the choice may be explained by a word of another that is still on its way. So
that is kept, and heard again once the choice has moved (`Choice.early`). If something else was true
after all, it is said again: the node that has the choice is asked when it has been quiet for long
(holders.py). Whoever was not heeded is told when the attempt, or the request, is over: it may keep
something for us.
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
    """Asked before anything of a message is acted on."""

    def __init__(self, directory: NodeDirectory, metrics: GatewayMetrics) -> None:
        self._directory = directory
        self._metrics = metrics

    def heeds(self, node: str, request: OpenRequest, choice: Choice, attempt: int) -> bool:
        """Whether `node` may say something of this attempt."""
        current = choice.stream.attempt
        if attempt == current and choice.heard:
            return node in choice.speakers
        if attempt <= current:
            return node in request.involved or self._could_compute(node, request)
        return False

    def heeds_taking_over(
        self, node: str, taker: str, request: OpenRequest, choice: Choice, attempt: int
    ) -> bool:
        """Whether `node` may say that `taker` has the choice now."""
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
        """Keep what another's word may still explain; count anything else."""
        request.refused.add(node)
        of_now = attempt == choice.stream.attempt
        if of_now and len(choice.early) < MAX_EARLY and self._could_compute(node, request):
            choice.early.append((node, message))
        else:
            self._count(message, node, request)

    def unexplained(self, request: OpenRequest, choice: Choice) -> None:
        """The attempt is over, and with it the time for what came too early to be explained."""
        for node, message in choice.early:
            self._count(message, node, request)
        choice.early.clear()

    def _could_compute(self, node: str, request: OpenRequest) -> bool:
        """A node that the registry names, and that would give the same tokens."""
        return request.fingerprint is not None and any(
            view.incarnation == node and request.fingerprint.mismatch(view.fingerprint) is None
            for view in self._directory.nodes()
        )

    def _count(self, message: Message, node: str, request: OpenRequest) -> None:
        kind = type(message).__name__
        self._metrics.refused_words.labels(kind).inc()
        log.warning("word.refused", node=node, kind=kind, request=request.id)
