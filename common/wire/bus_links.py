"""The links of one incarnation: how each begins, lives and ends, so that both ends agree on it.

Owns every link there is, what is said about links (`Open`, `Beat`, `Over`, `Goodbye`), and the
conclusion that one is down. The rules are in common/README.md. No I/O and no clock: bus.py gives it
what arrives and the time, and does what it asks for; so does a test, over a network of its own.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from common.logs import get_logger
from common.settings.config import BusSettings
from common.wire.codec import encode
from common.wire.message import Message
from common.wire.messages import Beat, Goodbye, Open, Over
from common.wire.senders import TO_GATEWAYS, TO_NODES, Kinds, is_own_word

log = get_logger("bus")

Progress = Callable[[], tuple[int, bool]]
"""The engine's step counter, and whether it has work."""


class Down(enum.StrEnum):
    """Why a link went down; explained in common/README.md."""

    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    SILENT = "silent"
    STALLED = "stalled"
    FULL = "full"
    IMPOSTOR = "impostor"
    GOODBYE = "goodbye"
    OVER = "over"
    CLOSED = "closed"


OVER_LINKS: Kinds = TO_GATEWAYS + TO_NODES
SAID_BY_PEER = frozenset({Down.GOODBYE, Down.OVER})


@dataclasses.dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link came up (`reason` None) or went down for good."""

    peer: str
    link: str
    reason: Down | None

    @property
    def up(self) -> bool:
        return self.reason is None


@dataclasses.dataclass(slots=True, eq=False)
class Link:
    """One link. `address` is the routing id that leads to the peer, b"" where we connected."""

    peer: str
    id: str
    address: bytes
    heard_at: float
    steps: int = -1
    moved_at: float = 0.0
    busy: bool = False
    up: bool = False
    wire: Any = None  # what the wire keeps of it

    @property
    def ours(self) -> bool:
        """We opened it."""
        return not self.address


class Wire(Protocol):
    """What carries the messages of links."""

    def put(self, link: Link, frame: bytes) -> Down | None:
        """Hand a message over, without waiting; or say why the link cannot take them any more."""

    def hang_up(self, link: Link) -> None:
        """Nothing more comes of this link; what was put may still leave."""


class LinkTable:
    """All links of one incarnation. `say` hears of each that comes up or goes down."""

    def __init__(
        self,
        incarnation: str,
        settings: BusSettings,
        wire: Wire,
        *,
        progress: Progress,
        say: Callable[[LinkEvent], None],
        hears: Kinds = OVER_LINKS,
    ) -> None:
        """`hears`: the kinds of messages that are for those above."""
        self.counts: Counter[str] = Counter()
        # sent, received, malformed, late, refused, and link ends
        self._hears = hears
        self._incarnation, self._settings, self._wire = incarnation, settings, wire
        self._progress, self._say = progress, say
        self._outgoing: dict[str, Link] = {}
        self._incoming: dict[str, Link] = {}
        self._by_address: dict[bytes, Link] = {}
        self._looked_at: float | None = None

    def __iter__(self) -> Iterator[Link]:
        return iter([*self._outgoing.values(), *self._incoming.values()])

    def with_peer(self, peer: str) -> list[Link]:
        """Those with this peer: ours first, which is the one to send over."""
        found = (self._outgoing.get(peer), self._incoming.get(peer))
        return [link for link in found if link is not None]

    def holds(self, link: Link) -> bool:
        return any(link is other for other in self.with_peer(link.peer))

    # Beginnings.

    def open(self, peer: str, link_id: str, now: float, wire: Any) -> Link:
        """A link that we open, over a connection of its own. It is up with the peer's first beat."""
        link = Link(peer, link_id, b"", now, wire=wire)
        self._outgoing[peer] = link
        self._put(link, Open(self._incarnation, peer))
        if self.holds(link):
            self._put(link, self._beat())
        return link

    def heard(self, source: Link | bytes, message: Message, now: float) -> Link | None:
        """A message over a link of ours, or from a routing id: its link, if it is for those above.
        None: it was about links, is of a link that is over, or is not its peer's to say."""
        link = source if isinstance(source, Link) else self._by_address.get(source)
        if link is None:
            assert isinstance(source, bytes)
            self._from_unknown(source, message, now)
            return None
        if not self.holds(link):
            self.counts["late"] += 1
            return None
        self.counts["received"] += 1
        link.heard_at = now
        if isinstance(message, Beat):
            self._heard_beat(link, message)
        elif isinstance(message, Over):
            self.end(link, Down.OVER if link.up else Down.IMPOSTOR)
        elif isinstance(message, Goodbye):
            self.end(link, Down.GOODBYE)
        elif isinstance(message, self._hears) and is_own_word(link.peer, message):
            return link
        elif not isinstance(message, Open):
            self._refuse(link, message)
        return None

    def _refuse(self, link: Link, message: Message) -> None:
        self.counts["refused"] += 1
        if self.counts["refused"].bit_count() == 1:  # 1, 2, 4, …: a flood fills no disk
            kind, count = type(message).__name__, self.counts["refused"]
            log.warning("bus.refused", peer=link.peer, kind=kind, count=count)

    def _from_unknown(self, address: bytes, message: Message, now: float) -> None:
        """Only `Open` makes a link, and it is said once: whatever else comes is of one that is over
        here, and its peer, which does not know that, is told at once."""
        peer, link_id = _names(address)
        if isinstance(message, Open) and (message.node, message.to) == (peer, self._incarnation):
            for older in [link for link in self.with_peer(peer) if not link.ours]:
                self.end(older, Down.DISCONNECTED)
            link = Link(peer, link_id, address, now)
            self._incoming[peer] = self._by_address[address] = link
            self.counts["received"] += 1
            self._came_up(link)
            self._put(link, self._beat())
        elif not isinstance(message, (Over, Goodbye)):
            self.counts["late"] += 1
            unknown = Link(peer, link_id, address, now)
            self._wire.put(unknown, encode(Over(self._incarnation, "unknown link")))

    def _heard_beat(self, link: Link, beat: Beat) -> None:
        if beat.node != link.peer:
            self.end(link, Down.IMPOSTOR)
            return
        if not link.up:
            self._came_up(link)
        if beat.steps != link.steps or not (beat.busy and link.busy):
            link.moved_at = link.heard_at
        link.steps, link.busy = beat.steps, beat.busy

    def _came_up(self, link: Link) -> None:
        link.up = True
        link.moved_at = link.heard_at
        self._say(LinkEvent(link.peer, link.id, None))
        log.debug("bus.up", peer=link.peer, link=link.id)

    # Life.

    def tick(self, now: float, *, inbox_full: bool) -> None:
        """Once per beat interval: say that we live, and look for peers that do not say so. Time in
        which we did not run, or could not read, is held against nobody."""
        settings, interval = self._settings, self._settings.beat_interval_s
        passed = 0.0 if self._looked_at is None else now - self._looked_at
        excused = passed if inbox_full else passed - 2 * interval
        self._looked_at = now
        beat = self._beat()
        for link in self:
            if excused > 0:
                link.heard_at += excused
                link.moved_at += excused
            if now - link.heard_at > settings.missed_beats * interval:
                self.end(link, Down.SILENT if link.up else Down.UNREACHABLE)
            elif link.busy and now - link.moved_at > settings.stall_limit_s:
                self.end(link, Down.STALLED)
            else:
                self._put(link, beat)

    def _beat(self) -> Beat:
        return Beat(self._incarnation, *self._progress())

    def _put(self, link: Link, message: Message) -> None:
        reason = self._wire.put(link, encode(message))
        if reason is not None:
            self.end(link, reason)

    # Ends.

    def end(self, link: Link, reason: Down, *, silently: bool = False) -> None:
        """Take a link down, once, and tell the peer, unless it was the peer who said so. If that
        word is lost the peer hears it in answer to its next one."""
        links = self._outgoing if link.ours else self._incoming
        if links.get(link.peer) is not link:
            return
        del links[link.peer]
        self._by_address.pop(link.address, None)
        if reason not in SAID_BY_PEER and not silently:
            self._wire.put(link, encode(Over(self._incarnation, reason.value)))
        self._wire.hang_up(link)
        self.counts[reason.value] += 1
        self._say(LinkEvent(link.peer, link.id, reason))
        say = log.debug if reason in (Down.CLOSED, Down.GOODBYE) else log.info
        say("bus.down", peer=link.peer, link=link.id, reason=reason.value)

    def close(self, *, goodbye: bool) -> None:
        """This incarnation ends, and every link with it; without a word, if that is how it ends."""
        for link in self:
            if goodbye:
                self._wire.put(link, encode(Goodbye(self._incarnation)))
            self.end(link, Down.CLOSED, silently=True)


def _names(address: bytes) -> tuple[str, str]:
    """Incarnation and link id in a routing id; ("", "") in one that is nobody's."""
    try:
        peer, _, link_id = address.decode("ascii").rpartition("/")
    except UnicodeDecodeError:
        return "", ""
    return (peer, link_id) if peer and link_id else ("", "")
