"""What peers say that the registry has not named yet.

A node that has just come up may be told of by another node, and speak, before this gateway has read
its record; whoever else has a link and no record is no node. So what such a peer says waits, in order,
until it is named; where that does not come about, it is dropped, and the link is closed: a node after
all would open another, and say again what matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from common.bus import Received
from common.logs import get_logger

log = get_logger("strangers")

WAITING = 1024  # messages of all strangers together
READINGS = 4  # of the registry, in which one that is a node is named


class Strangers:
    """Give it what they say; tell it of each reading of the registry."""

    def __init__(self, disconnect: Callable[[str], None]) -> None:
        self.dropped = 0  # messages
        self._disconnect = disconnect
        self._said: defaultdict[str, list[Received]] = defaultdict(list)
        self._readings: dict[str, int] = {}

    def heard(self, received: Received) -> None:
        if sum(map(len, self._said.values())) >= WAITING:
            self.dropped += 1
            return
        self._readings.setdefault(received.peer, 0)
        self._said[received.peer].append(received)

    def read(self, is_node: Callable[[str], bool]) -> list[Received]:
        """The registry was read: what those have said that turn out to be nodes."""
        admitted: list[Received] = []
        for peer in list(self._readings):
            self._readings[peer] += 1
            if is_node(peer):
                admitted += self._said[peer]
            elif self._readings[peer] < READINGS:
                continue
            else:
                self.dropped += len(self._said[peer])
                log.warning("stranger.refused", peer=peer, messages=len(self._said[peer]))
                self._disconnect(peer)
            del self._readings[peer], self._said[peer]
        return admitted
