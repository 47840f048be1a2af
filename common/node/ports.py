"""Between a node and its role: what each has of the other.

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
    """What a role works with, and what stands between it and the node (attempt.py, sender.py,
    entries.py, steps.py)."""

    incarnation: str
    state: NodeState
    engine: Engine
    kv: NodeKV
    links: Links
    peers: Peers
    gateways: Gateways
    suspects: Suspects

    def connect(self, peer: str, endpoint: str) -> None:
        """Have a link of the bus with a peer, or raise `LinkLost`."""
        ...

    def wake(self) -> None:
        """There may be work for the engine, or room for another entry."""
        ...

    def done(self, entry: Entry) -> None:
        """The attempt is over here: its queue entry goes."""
        ...

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run something in the background; the node's end waits for it."""
        ...


class NodeRole(Protocol):
    """Called by the node, in about this order in a request's life."""

    def capacity(self) -> int:
        """How many more queue entries this node would begin soon."""
        ...

    def accept(self, entry: Entry) -> None:
        """A claimed attempt. Whatever is wrong with it is told to its gateway, never raised."""
        ...

    def may_go_on(self, sequence: Sequence) -> bool:
        """Whether this sequence, which a step under way has, may be in the next one whatever it gets
        from this one. False for one that this role ends or pauses between two steps."""
        ...

    def step_begins(self, step: Step) -> None: ...

    def handed_over(self, step: Step) -> list[Chunk]:
        """The chunks of the step whose blocks go to another node: they are sealed at once."""
        ...

    def step_filled(self, chunks: list[Chunk]) -> None:
        """The blocks of these, of those that `handed_over` named, hold sound KV and are sealed; the
        step goes on to choose tokens, and may yet fail."""
        ...

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None: ...

    def arrived(self, adopted: Adopted) -> None:
        """A sequence is here with its KV, and its sender knows: it runs here from now on."""
        ...

    def cancel(
        self, gateway: str, request: str, attempt: int, reason: str, choices: AbstractSet[int] = frozenset()
    ) -> None:
        """Free everything of these choices (none named: of all) in attempts up to `attempt`, if the
        request is this gateway's."""
        ...

    def give_up(self, engine_id: str, error: PdqError, *, retryable: bool) -> None:
        """This attempt, as the engine names it, cannot go on here: its gateway is told why."""
        ...

    def holds(self, key: ChoiceKey) -> bool:
        """Whether this choice is computed here, or on its way elsewhere."""
        ...

    def gateway_linked(self, gateway: str) -> None:
        """A new link: say again what it must know to follow its requests."""
        ...

    def gateway_lost(self, gateway: str) -> None:
        """Free everything of this gateway's requests."""
        ...

    def peers_changed(self) -> None:
        """The records of the other nodes were read again."""
        ...

    def drain(self) -> None:
        """This node is to end: nothing new comes, and what can go on elsewhere should."""
        ...

    @property
    def num_open(self) -> int:
        """Attempts this node still has something of; 0 when idle."""
        ...
