"""Whose word about a choice counts.

A node has the system's key, a link, and a record in the registry (strangers.py holds up what others
say). Beyond that, what it says of a choice counts only if it may have that choice:

    nobody has spoken of it yet     any node that could compute it: its queue entry may have moved
    a node has it                   that one, and former ones of the attempt
    a node that is to take it over  says so first (`TookOver`), or the one that has it does; it could
                                    compute it, too
    an older attempt                whoever may have had it; nothing follows but that it is stopped

What is refused is counted and logged, and changes nothing. If it was true after all, it is said again:
the node that has the choice is asked when it has been quiet for long (holders.py). Whoever was refused
is told when the attempt, or the request, is over: it may keep something for us.
"""

from __future__ import annotations

from common.logs import get_logger
from gateway.metrics import GatewayMetrics
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeDirectory

log = get_logger("speakers")


class Speakers:
    """Asked before anything of a message is acted on."""

    def __init__(self, directory: NodeDirectory, metrics: GatewayMetrics) -> None:
        self._directory = directory
        self._metrics = metrics

    def heeds(
        self, kind: str, node: str, request: OpenRequest, choice: Choice, attempt: int
    ) -> bool:
        """Whether `node` may say something of this attempt; False is counted."""
        current = choice.stream.attempt
        if attempt == current and choice.heard:
            heeded = node in choice.speakers
        elif attempt <= current:
            heeded = node in request.involved or self._could_compute(node, request)
        else:
            heeded = False
        return heeded or self._refuse(kind, node, request)

    def heeds_taking_over(
        self, node: str, taker: str, request: OpenRequest, choice: Choice, attempt: int
    ) -> bool:
        """Whether `node` may say that `taker` has the choice now."""
        if attempt == choice.stream.attempt and choice.heard and node == taker:
            may = node in choice.speakers or self._could_compute(node, request)
            return may or self._refuse("TookOver", node, request)
        return self.heeds("TookOver", node, request, choice, attempt)

    def _could_compute(self, node: str, request: OpenRequest) -> bool:
        """A node that the registry names, and that would give the same tokens."""
        return request.fingerprint is not None and any(
            view.incarnation == node and request.fingerprint.mismatch(view.fingerprint) is None
            for view in self._directory.nodes()
        )

    def _refuse(self, kind: str, node: str, request: OpenRequest) -> bool:
        request.refused.add(node)
        self._metrics.refused_words.labels(kind).inc()
        log.warning("word.refused", node=node, kind=kind, request=request.work.request)
        return False
