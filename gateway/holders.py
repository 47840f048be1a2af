"""Whether nodes have what they are believed to have.

Owns: the question (`HoldsQuery`), and when it is asked. What a link loses, when it ends, is not known
to either end; a choice may have a holder that let go of it, or never had it. So a node is asked for
all that it is believed to hold on each new link, and for what has been quiet for long at any time.
The answers are ordinary messages: tokens again, `TookOver`, or `Failed`, upon which the choice is
retried. Knows nothing of choices that no node has spoken of yet: those are in Redis (whereabouts.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from common.wire.messages import HoldsQuery
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeBus, NodeDirectory

QUIET_S = 5.0  # without a word about a choice: then whoever should have it is asked
ASKED_AT_ONCE = 512  # choices in one message

Asked = tuple[str, int, int, int]  # request, attempt, choice, below


class Holders:
    """Call `linked` for each link that comes up, or ends beside another; `look` at intervals."""

    def __init__(
        self,
        gateway: str,
        open_requests: Mapping[str, OpenRequest],
        bus: NodeBus,
        directory: NodeDirectory,
        lost: Callable[[str, str], None],
    ) -> None:
        """`lost` hears of a holder that there is no link with, and no record of."""
        self._gateway = gateway
        self._open = open_requests
        self._bus = bus
        self._directory = directory
        self._lost = lost

    def linked(self, node: str) -> None:
        """What was on its way to or from this node may be lost: ask for all of it."""
        self._ask(node, [asked for name, _, asked in self._expected() if name == node])

    def look(self) -> None:
        """Ask for what has been quiet for long."""
        now = time.monotonic()
        quiet: defaultdict[str, list[Asked]] = defaultdict(list)
        for node, choice, asked in self._expected():
            if now - choice.stirred_at >= QUIET_S:
                quiet[node].append(asked)
        for node, choices in quiet.items():
            if self._directory.known(node):
                self._ask(node, choices)
            else:
                self._lost(node, "absent")

    def _expected(self) -> Iterator[tuple[str, Choice, Asked]]:
        """Every node from which something of a choice must still come."""
        for name, request in self._open.items():
            for index, choice in enumerate(request.choices):
                if choice.done or not choice.heard:
                    continue
                stream = choice.stream
                asked = (name, stream.attempt, index, stream.below)
                yield choice.holder, choice, asked
                for node in choice.owes():
                    if node != choice.holder:
                        yield node, choice, asked

    def _ask(self, node: str, choices: list[Asked]) -> None:
        now = time.monotonic()
        for request, _, index, _ in choices:
            self._open[request].choices[index].stirred_at = now
        for start in range(0, len(choices), ASKED_AT_ONCE):
            part = tuple(choices[start : start + ASKED_AT_ONCE])
            self._bus.send(node, HoldsQuery(self._gateway, part))
