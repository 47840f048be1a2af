"""Messages of peers that the registry has not named yet.

A node that has just started may be named by another node, and may speak, before this gateway has read its
record. Any other peer without a record is no node. So the messages of such a peer wait, in order, until
the registry names it. If it does not, they are dropped and the link is closed: a real node would open
another link and repeat what matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from common.logs import get_logger
from common.wire.bus import Received

log = get_logger("strangers")

WAITING = 1024  # messages of all strangers together
WAITING_OF_ONE = 128
READINGS = 4  # of the registry: a node is named in one of so many


class Strangers:
    """Call `heard` with each message of such a peer, and `read` after each reading of the registry."""

    def __init__(self, disconnect: Callable[[str], None]) -> None:
        self.dropped = 0  # messages
        self._waiting = 0
        self._disconnect = disconnect
        self._said: defaultdict[str, list[Received]] = defaultdict(list)
        self._readings: dict[str, int] = {}

    def heard(self, received: Received) -> None:
        self._readings.setdefault(received.peer, 0)
        said = self._said[received.peer]
        if len(said) >= WAITING_OF_ONE or self._waiting >= WAITING:
            self.dropped += 1
            return
        self._waiting += 1
        said.append(received)

    def read(self, is_node: Callable[[str], bool]) -> list[Received]:
        """Call after the registry was read. Returns the messages of those peers that it names now."""
        admitted: list[Received] = []
        for peer in list(self._readings):
            self._readings[peer] += 1
            named = is_node(peer)
            if not named and self._readings[peer] < READINGS:
                continue
            said = self._said.pop(peer)
            del self._readings[peer]
            self._waiting -= len(said)
            if named:
                admitted += said
            else:
                self.dropped += len(said)
                log.warning("stranger.refused", peer=peer, messages=len(said))
                self._disconnect(peer)
        return admitted
