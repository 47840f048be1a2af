"""One accepted request while it is open: its choices, where they are, and what its client reads.

Owns: the state that dispatch.py and listener.py change, and the queue of updates that the HTTP side
reads. Does no I/O and decides nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

from common.errors import Overloaded, PdqError
from common.kv_layout import Fingerprint
from common.request import Request
from common.wire.message import Message
from common.wire.messages import Dispatch
from gateway.streams import ChoiceStream, Token

MAX_BACKLOG = 2**17  # unread tokens, alternatives among logprobs counted too


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A validated request: token ids and parameters, nothing of HTTP."""

    request: Request  # its tokens are the prompt
    n: int = 1
    suspected: bool = False  # of crashing nodes
    node: str = ""  # the incarnation that must compute it; "": any


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """New tokens of one choice, in order; `finished` says why it ended, with the last of them."""

    choice: int
    tokens: tuple[Token, ...]
    finished: str | None


@dataclasses.dataclass(slots=True)
class Choice:
    stream: ChoiceStream
    holder: str = ""  # the incarnation whose death would lose it; "" while it is being placed
    placed_at: float = 0.0  # when Redis took the attempt; 0: not yet
    heard: bool = False  # the holder has said something: its entry was read
    held_from: int = 0  # the position from which on the holder's tokens come; 0: from the start
    owing: dict[str, int] = dataclasses.field(default_factory=dict)
    """Former holders in this attempt: the position below which the tokens are theirs to send."""
    tries: int = 1
    unacknowledged: dict[str, int] = dataclasses.field(default_factory=dict)
    """Nodes whose tokens wait behind a gap: the position below which all of them have arrived."""
    early: list[tuple[str, Message]] = dataclasses.field(default_factory=list)
    """Messages, with their senders, of nodes that are not known to have the choice yet."""
    refusals: int = 0  # times that no node had room; up to 10
    done: bool = False  # finished, or stopped by us
    last_arrival: float = 0.0
    stirred_at: float = 0.0  # when a node last spoke of it, or was asked about it

    @property
    def speakers(self) -> set[str]:
        """Nodes that have, or had, the choice in this attempt."""
        return {self.holder, *self.owing, *self.unacknowledged}

    def owes(self) -> list[str]:
        """Former holders that have not sent all that is theirs."""
        return [node for node, end in self.owing.items() if self.stream.below < end]


class OpenRequest:
    """One accepted request, as its HTTP handler sees it: a stream of updates, and `stop`."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.attempt = 1
        self.cached_tokens = 0
        self.fingerprint: Fingerprint | None = None
        self.accepted_at = 0.0
        self.dispatches: dict[int, tuple[str, Dispatch]] = {}  # by attempt: where, what
        self.uncomputed: dict[int, tuple[str, int]] = {}  # by attempt: node and prompt tokens there
        self.involved: set[str] = set()  # incarnations that may hold something of it
        self.refused: set[str] = set()  # incarnations whose messages about it were refused
        self.choices = [
            Choice(ChoiceStream(len(work.request.token_ids), work.request.params.max_tokens))
            for _ in range(work.n)
        ]
        self._updates: asyncio.Queue[Update | PdqError] = asyncio.Queue()
        self._backlog = 0
        self.failed = False

    @property
    def id(self) -> str:
        return self.work.request.id

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def publish(self, update: Update) -> None:
        """Queue an update for the client. A client that falls too far behind loses its request."""
        self._backlog += _weight(update)
        self._updates.put_nowait(update)
        if self._backlog > MAX_BACKLOG:
            self.fail(Overloaded("the answer was not read while it grew"))

    def fail(self, error: PdqError) -> None:
        if not self.failed:
            self.failed = True
            self._updates.put_nowait(error)

    def stop(self, choice: int) -> None:
        """Mark a choice that the client wants no more of. The dispatcher calls this and tells the nodes."""
        self.choices[choice].done = True

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield updates until every choice is done. Raises the error that the request failed with."""
        while not (self.done and self._updates.empty()):
            item = await self._updates.get()
            if isinstance(item, PdqError):
                raise item
            self._backlog -= _weight(item)
            yield item


def _weight(update: Update) -> int:
    return sum(1 + (len(t.logprobs.top_ids) if t.logprobs else 0) for t in update.tokens)
