"""What the gateway needs from the world, as four small protocols and the values they exchange.

Owns: the shape of the seams to Redis (`RequestStore`), to the nodes' sockets (`NodeBus`) and to the
registry of nodes (`NodeDirectory`), and `Inbox`, the gateway's own side that they call. Knows nothing of
how any of them works, so that a test can replace all three by one fake node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from common.kv_layout import Fingerprint
from common.store.requests import Where
from common.wire.message import Message
from common.wire.messages import Dispatch, Stage

PREFILL, DECODE, UNIFIED = "prefill", "decode", "unified"


@dataclasses.dataclass(frozen=True, slots=True)
class NodeLoad:
    """What a node last said about itself."""

    waiting_tokens: int = 0  # prompt tokens queued or being computed
    running: int = 0  # sequences that decode


@dataclasses.dataclass(frozen=True, slots=True)
class NodeView:
    """One incarnation of a node, as the gateway sees it at this moment."""

    incarnation: str
    role: str  # prefill | decode | unified
    endpoint: str  # where its peers reach it
    fingerprint: Fingerprint
    max_model_len: int
    total_blocks: int
    healthy: bool = True
    draining: bool = False
    load: NodeLoad = NodeLoad()

    @property
    def usable(self) -> bool:
        """Whether it may be given something new."""
        return self.healthy and not self.draining


class NodeDirectory(Protocol):
    """The nodes there are, from the registry. Changes are announced to `Inbox`."""

    def nodes(self) -> Sequence[NodeView]: ...

    async def alone(self, node: str) -> str | None:
        """`NodeRecord.alone` as it was written last; None if it cannot be read."""

    def lost(self, node: str) -> bool:
        """Whether `on_node_lost` was called for it, and it has not come back since."""

    def known(self, node: str) -> bool:
        """Whether there is a record of it, or a link with it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How one choice ended, in which attempt."""

    choice: int
    attempt: int
    finish_reason: str
    generated: int


class RequestStore(Protocol):
    """The request's record and its queue entry, in Redis. All idempotent, and never moving back.

    Every method may raise `ServiceUnavailable`; `accept` also `Overloaded`.
    """

    async def accept(self, node: str, dispatch: Dispatch, *, claimed_by: str = "") -> None:
        """Write record and queue entry, atomically. With `claimed_by`, write only the record: that
        incarnation works on it already, and Redis has forgotten."""

    async def locate(self, choices: Sequence[tuple[str, int, int]]) -> Sequence[Where]:
        """Say for each (request, attempt, choice) who has it."""

    async def advance(self, stage: Stage) -> None:
        """Merge what a node said about a choice into the record."""

    async def finish(self, request: str, endings: Sequence[Ending]) -> None:
        """Record that all choices have ended as the client asked."""

    async def bury(self, dispatch: Dispatch, reason: str) -> None:
        """Keep a dispatch that nodes failed by as a dead letter, for a person to look at."""

    async def open_requests(self, gateway: str) -> set[str]:
        """The requests that Redis lists as open at this gateway."""

    async def end(self, request: str, state: str, code: str, message: str) -> None:
        """Record `failed` or `cancelled` for every choice that has not ended, in whatever attempt it is. An
        entry that nobody has read is not computed any more."""


class NodeBus(Protocol):
    """Sockets to the nodes. What comes in is handed to `Inbox`, on the event loop."""

    @property
    def endpoint(self) -> str:
        """Where nodes send this gateway's tokens."""

    def send(self, node: str, message: Message) -> None:
        """Queue `message` for `node`. Never blocks; without a link it is dropped and counted:
        whatever travels this way (acknowledgements, cancels) is repeated by what follows it."""


class Inbox(Protocol):
    """What the seams call, always from the event loop."""

    def on_message(self, node: str, message: Message) -> None: ...

    def on_node_linked(self, node: str) -> None:
        """A link with the node came up, or one ended beside another: messages on their way may be lost."""

    def on_node_lost(self, node: str, reason: str) -> None:
        """This incarnation is dead: link lost, beat without progress, or said goodbye."""

    def on_interval(self) -> None:
        """A while has passed, whether Redis answers or not."""

    def on_nodes_changed(self) -> None:
        """A node came, left, or changed state or load."""
