"""Nodes, Redis and sockets for the gateway's tests, in one process and without any of them.

`FakeCluster` stands behind all three ports of the gateway. Its nodes answer as real ones do: an
entry is claimed once, the first token comes from the prefill node, the rest from the decode node
after it took over, and the tokens are a pure function of prompt, seed and choice. What a test wants
to go wrong is a method: `kill`, `hold`, `refuse`. Every message goes through the codec.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from common.errors import PdqError
from common.identity import ModelIdentity
from common.kv_layout import Fingerprint
from common.request import Request
from common.store.requests import Place, Where
from common.wire.codec import decode, encode
from common.wire.message import Message
from common.wire.messages import (
    Cancel,
    Dispatch,
    Failed,
    Stage,
    TokenLogprobs,
    TokenRun,
    Tokens,
    TokensAck,
    TookOver,
)
from gateway.ports import DECODE, PREFILL, UNIFIED, Ending, Inbox, NodeView
from tests.support.redis import HANGS_S

UNKNOWN = Where(Place.UNKNOWN)
FINGERPRINT = Fingerprint("stories", "main", "layout", "cpu-fp32", 16, tokenizer="letters")
MODEL = ModelIdentity("stories", "main", "letters")
EOS = 2

Reply = Callable[[Dispatch, int], Sequence[int]]
"""All tokens of a choice, from `prompt_len` on; ends in "stop" unless max_tokens comes first."""


def endless(request: Request, choice: int) -> list[int]:
    """Ids of printable ASCII in the stories tokenizer, from a hash of what tokens depend on."""
    key = (request.token_ids[: request.prompt_len], request.params.seed, choice)
    return [
        410 + hashlib.blake2b(f"{key} {index}".encode(), digest_size=1).digest()[0] % 64
        for index in range(request.params.max_tokens + 1)
    ]


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(HANGS_S):
        while not condition():  # noqa: ASYNC110  (the conditions are of many kinds)
            await asyncio.sleep(0.001)


@dataclasses.dataclass(slots=True)
class FakeNode:
    """One incarnation. `hold_at`: it generates that many tokens of each choice and then waits."""

    view: NodeView
    hold_at: int | None = None
    refusal: Failed | None = None
    cached_tokens: int = 0
    tasks: dict[tuple[str, int, int], asyncio.Task[None]] = dataclasses.field(default_factory=dict)
    alive: bool = True


class FakeCluster:
    """Implements `NodeDirectory`, `RequestStore` and `NodeBus`. Set `inbox` before use."""

    endpoint = "fake://gateway"

    def __init__(self, reply: Reply = lambda dispatch, choice: endless(dispatch.request, choice)) -> None:
        self.inbox: Inbox
        self.reply = reply
        self.members: dict[str, FakeNode] = {}
        self.dispatched: list[tuple[str, Dispatch]] = []
        self.asserted: list[tuple[str, int, str]] = []
        self.cancelled: list[tuple[str, Cancel]] = []
        self.acks: list[tuple[str, tuple[str, int, int, int]]] = []
        self.finished: dict[str, list[Ending]] = {}
        self.ended: dict[str, tuple[str, str, str]] = {}
        self.alone_at: dict[str, str] = {}  # what a node's record says
        self.buried: list[tuple[Dispatch, str]] = []
        self.stages: list[Stage] = []
        self.store_error: PdqError | None = None
        self.accepting = 0  # writes begun
        self.batch = 1  # tokens in one message
        self.drafted = 0  # of them, and others in vain, by a node that decodes
        self._released = asyncio.Event()

    # ── What a test does ─────────────────────────────────────────────────────────────────────────

    def add(self, name: str, role: str = UNIFIED, **fields: object) -> FakeNode:
        view = NodeView(name, role, f"fake://{name}", FINGERPRINT, 512, 64)
        node = FakeNode(dataclasses.replace(view, **fields))  # type: ignore[arg-type]
        self.members[name] = node
        if hasattr(self, "inbox"):
            self.inbox.on_nodes_changed()
        return node

    def kill(self, name: str, reason: str = "killed by the test") -> None:
        """kill -9, seen by the gateway as the loss of the link."""
        node = self.members.pop(name)
        node.alive = False
        for task in node.tasks.values():
            task.cancel()
        self.inbox.on_node_lost(name, reason)

    def release(self) -> None:
        """Let every node that holds go on."""
        for node in self.members.values():
            node.hold_at = None
        self._released.set()

    @property
    def running(self) -> int:
        return sum(len(node.tasks) for node in self.members.values())

    def assert_idle(self) -> None:
        """Nothing computes, and every request that was accepted has ended."""
        assert self.running == 0, "a node still computes"
        accepted = {dispatch.request.id for _, dispatch in self.dispatched}
        assert accepted <= self.finished.keys() | self.ended.keys(), "a record was left open"

    # ── NodeDirectory ────────────────────────────────────────────────────────────────────────────

    def nodes(self) -> list[NodeView]:
        return [node.view for node in self.members.values()]

    async def alone(self, node: str) -> str | None:
        return self.alone_at.get(node)

    def lost(self, node: str) -> bool:
        return node not in self.members

    def known(self, node: str) -> bool:
        return node in self.members

    # ── RequestStore ─────────────────────────────────────────────────────────────────────────────

    async def accept(self, node: str, dispatch: Dispatch, *, claimed_by: str = "") -> None:
        self.accepting += 1
        await asyncio.sleep(0.002)  # a round trip
        if self.store_error is not None:
            raise self.store_error
        if claimed_by or any(d == dispatch for _, d in self.dispatched):
            self.asserted.append((dispatch.request.id, dispatch.attempt, claimed_by))
            return
        copied = decode(encode(dispatch))
        assert isinstance(copied, Dispatch)
        self.dispatched.append((node, copied))
        if node in self.members:
            self._start(self.members[node], copied)

    async def locate(self, choices: Sequence[tuple[str, int, int]]) -> list[Where]:
        if self.store_error is not None:
            raise self.store_error
        nodes = {(sent.request.id, sent.attempt): node for node, sent in self.dispatched}
        return [
            Where(Place.QUEUED, node) if (node := nodes.get((request, attempt))) else UNKNOWN
            for request, attempt, _ in choices
        ]

    async def advance(self, stage: Stage) -> None:
        self.stages.append(stage)

    async def finish(self, request: str, endings: Sequence[Ending]) -> None:
        if self.store_error is not None:
            raise self.store_error
        self.finished[request] = list(endings)

    async def bury(self, dispatch: Dispatch, reason: str) -> None:
        self.buried.append((dispatch, reason))

    async def open_requests(self, gateway: str) -> set[str]:
        accepted = {sent.request.id for _, sent in self.dispatched if sent.request.gateway == gateway}
        return accepted - self.finished.keys() - self.ended.keys()

    async def end(self, request: str, state: str, code: str, message: str) -> None:
        self.ended[request] = (state, code, message)

    # ── NodeBus ──────────────────────────────────────────────────────────────────────────────────

    def send(self, node: str, message: Message) -> None:
        message = decode(encode(message))
        if isinstance(message, TokensAck):
            self.acks += [(node, ack) for ack in message.acks]
        elif isinstance(message, Cancel):
            self.cancelled.append((node, message))
            for member in self.members.values():  # a prefill node passes it on to its peer
                for key, task in list(member.tasks.items()):
                    wanted = not message.choices or key[2] in message.choices
                    if key[0] == message.request and key[1] <= message.attempt and wanted:
                        task.cancel()

    def deliver(self, node: str, message: Message) -> None:
        self.inbox.on_message(node, decode(encode(message)))

    # ── The nodes ────────────────────────────────────────────────────────────────────────────────

    def _start(self, node: FakeNode, dispatch: Dispatch) -> None:
        for choice in dispatch.choices:
            key = (dispatch.request.id, dispatch.attempt, choice)
            task = asyncio.create_task(self._compute(node, dispatch, choice))
            node.tasks[key] = task
            task.add_done_callback(lambda _, node=node, key=key: node.tasks.pop(key, None))  # type: ignore[misc]

    async def _compute(self, node: FakeNode, dispatch: Dispatch, choice: int) -> None:
        name, attempt = node.view.incarnation, dispatch.attempt
        stage = Stage(name, dispatch.request.id, attempt, choice, "prefilling", {}, node.cached_tokens)
        self.deliver(name, stage)
        if node.refusal is not None:
            refusal = dataclasses.replace(
                node.refusal, node=name, request=dispatch.request.id, attempt=attempt, choice=choice
            )
            self.deliver(name, refusal)
            return
        ids = list(self.reply(dispatch, choice))
        stopped = len(ids) <= dispatch.request.params.max_tokens
        ids = ids[: dispatch.request.params.max_tokens]
        index = len(dispatch.request.token_ids) - dispatch.request.prompt_len
        sender = node
        while index < len(ids):
            await self._held(sender, index)
            if not sender.alive:
                return
            end = min(index + self.batch, len(ids))
            reason = ("stop" if stopped else "length") if end == len(ids) else ""
            room = dispatch.request.params.max_tokens - 1 - index
            drafted = min(self.drafted, room) if sender.view.role != PREFILL else 0
            run = TokenRun(
                dispatch.request.id,
                attempt,
                choice,
                dispatch.request.prompt_len + index,
                tuple(ids[index:end]),
                self._logprobs(dispatch, ids[index:end]),
                reason,
                drafted,
                min(drafted, end - index - 1),
            )
            self.deliver(sender.view.incarnation, Tokens(sender.view.incarnation, (run,)))
            index = end
            if dispatch.decode_node and sender is node and not reason:
                decoder = self._decoder(dispatch)
                if decoder is None:
                    lost = Failed(name, dispatch.request.id, attempt, choice, "link_lost", "no peer", True)
                    self.deliver(name, lost)
                    return
                sender = self._hand_over(node, decoder, dispatch, choice, index)
            await asyncio.sleep(0)

    def _decoder(self, dispatch: Dispatch) -> FakeNode | None:
        """The provisional decode node, or another when that one is gone."""
        chosen = self.members.get(dispatch.decode_node)
        others = (node for node in self.members.values() if node.view.role == DECODE)
        return chosen or next(others, None)

    def _hand_over(
        self, node: FakeNode, decoder: FakeNode, dispatch: Dispatch, choice: int, index: int
    ) -> FakeNode:
        key = (dispatch.request.id, dispatch.attempt, choice)
        task = node.tasks.pop(key)
        decoder.tasks[key] = task
        task.add_done_callback(lambda _: decoder.tasks.pop(key, None))
        name = decoder.view.incarnation
        position = dispatch.request.prompt_len + index
        for teller in (name, node.view.incarnation):
            word = TookOver(name, dispatch.request.id, dispatch.attempt, choice, position)
            self.deliver(teller, word)
        return decoder

    async def _held(self, node: FakeNode, index: int) -> None:
        while node.hold_at is not None and index >= node.hold_at:
            await self._released.wait()

    @staticmethod
    def _logprobs(dispatch: Dispatch, ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        if dispatch.request.params.logprobs is None:
            return ()
        others = tuple(range(410, 410 + dispatch.request.params.logprobs))
        return tuple(
            TokenLogprobs(-token_id / 1000, 1, others, tuple(-1.0 - i for i in range(len(others))))
            for token_id in ids
        )


def pair(cluster: FakeCluster) -> None:
    """One prefill and one decode node."""
    cluster.add("p1", PREFILL)
    cluster.add("d1", DECODE)
