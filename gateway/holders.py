"""Asks nodes whether they still have the choices that they are believed to have.

Owns: the question (`HoldsQuery`), and when it is asked. Neither end knows what was lost when a link
ended, and a holder may have let go of a choice, or never have had it. So a node is asked on each new link
about all that it is believed to hold, and at any time about a choice that has been quiet for long. The
answers are ordinary messages: tokens again, `TookOver`, or `Failed`, upon which the choice is retried.
Knows nothing of choices that no node has spoken of yet: Redis knows where those are (whereabouts.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from common.wire.messages import HoldsQuery
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeBus, NodeDirectory

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
        quiet_s: float,
    ) -> None:
        """`lost` is called for a holder that has neither a link nor a record."""
        self._gateway = gateway
        self._open = open_requests
        self._bus = bus
        self._directory = directory
        self._lost = lost
        self._quiet_s = quiet_s

    def linked(self, node: str) -> None:
        """Ask a node for all that is expected of it: messages either way may have been lost."""
        self._ask(node, [asked for name, _, asked in self._expected() if name == node])

    def look(self) -> None:
        """Ask about choices that have been quiet for long."""
        now = time.monotonic()
        quiet: defaultdict[str, list[Asked]] = defaultdict(list)
        for node, choice, asked in self._expected():
            if now - choice.stirred_at >= self._quiet_s:
                quiet[node].append(asked)
        for node, choices in quiet.items():
            if self._directory.known(node):
                self._ask(node, choices)
            else:
                self._lost(node, "absent")

    def _expected(self) -> Iterator[tuple[str, Choice, Asked]]:
        """Yield every node that still owes something of a choice."""
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
