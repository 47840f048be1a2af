"""The interfaces between a node and its role.

A role is the part of a node that decides what to do with requests. The node (app.py) owns engine, bus,
queue and links, and calls the role (`NodeRole`) on the event loop's thread; the role calls
`NodeServices`.
"""

from __future__ import annotations

from collections.abc import Coroutine
from collections.abc import Set as AbstractSet
from typing import Protocol

from common.engine import Engine
from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk, Step
from common.errors import PdqError
from common.node.gateways import Gateways
from common.node.kv import NodeKV
from common.node.peers import Peers
from common.node.suspects import Suspects
from common.node.token_stream import ChoiceKey
from common.store.queue import Entry
from common.store.registry import NodeState
from kv_transfer.link import Links
from kv_transfer.ports import Adopted


class NodeServices(Protocol):
    """What a node offers its role, and the parts between them (attempt.py, sender.py, entries.py,
    steps.py)."""

    incarnation: str
    state: NodeState
    engine: Engine
    kv: NodeKV
    links: Links
    peers: Peers
    gateways: Gateways
    suspects: Suspects

    def connect(self, peer: str, endpoint: str) -> None:
        """Link the bus to a peer, or raise `LinkLost`."""
        ...

    def wake(self) -> None:
        """There may be work for the engine, or room for another entry."""
        ...

    def done(self, entry: Entry) -> None:
        """The attempt is over here: delete its queue entry."""
        ...

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run something in the background; the node's end waits for it."""
        ...


class NodeRole(Protocol):
    """What a node calls, in about this order in a request's life."""

    def capacity(self) -> int:
        """Number of queue entries that this node would begin soon."""
        ...

    def accept(self, entry: Entry) -> None:
        """Take a claimed attempt. Tell its gateway whatever is wrong with it, instead of raising."""
        ...

    def may_go_on(self, sequence: Sequence) -> bool:
        """Whether this sequence, which a step under way has, may be in the next one whatever it gets
        from this one. False for one that this role ends or pauses between two steps."""
        ...

    def step_begins(self, step: Step) -> None: ...

    def handed_off(self, step: Step) -> list[Chunk]:
        """The chunks of the step whose blocks go to another node, and are sealed as soon as they are full."""
        ...

    def step_filled(self, chunks: list[Chunk]) -> None:
        """The blocks of these chunks (of those that `handed_off` named) hold sound KV and are sealed. The
        step goes on to choose tokens, and may still fail."""
        ...

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None: ...

    def arrived(self, adopted: Adopted) -> None:
        """Run a sequence that has arrived with its KV; its sender was told."""
        ...

    def cancel(
        self, gateway: str, request: str, attempt: int, reason: str, choices: AbstractSet[int] = frozenset()
    ) -> None:
        """Free everything of these choices (of all, if none is named) in attempts up to `attempt`, if the
        request is this gateway's."""
        ...

    def give_up(self, engine_id: str, error: PdqError, *, retryable: bool) -> None:
        """End this attempt, as the engine names it, and tell its gateway why."""
        ...

    def holds(self, key: ChoiceKey) -> bool:
        """Whether this choice is computed here, or on its way elsewhere."""
        ...

    def gateway_linked(self, gateway: str) -> None:
        """Say again, on a new link, what the gateway must know to follow its requests."""
        ...

    def gateway_lost(self, gateway: str) -> None:
        """Free everything of this gateway's requests."""
        ...

    def peers_changed(self) -> None:
        """Look at the records of the other nodes, which were read again."""
        ...

    def drain(self) -> None:
        """Move what can go on elsewhere: this node is to end, and gets nothing new."""
        ...

    @property
    def num_open(self) -> int:
        """Number of attempts of which this node still has something; 0 when idle."""
        ...
