"""Which node computes a request: the interface, and the policy for now.

Owns: what a router is asked (`RouteQuestion`) and answers (`Decision`, with its explanation), who
is a candidate at all, and the least-loaded policy with prefix affinity. Knows nothing of how a
request gets to the node, and keeps no state of requests.

The policy estimates the work before the first token, in prompt tokens: what waits at the node plus
what of this prompt it does not hold. Estimates within one block of the best are equal, and among
equals a hash of the request decides: a hot prefix that several nodes hold spreads over them, and
the same request asked twice gives the same answer.

A decode node that idles computes a prompt itself, and goes on with it, where that is less work than at any
other node by more than a block. It idles while no sequence runs there; and what it has taken never exceeds
`decode_prompt_tokens`: a sequence that arrives meanwhile waits for so many at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from common.errors import ContextLengthExceeded, NeverFits
from common.identity import ModelIdentity
from common.kv_layout import Fingerprint, HashChain
from common.request import Request
from gateway.ports import DECODE, PREFILL, UNIFIED, NodeView
from gateway.prefix_index import PrefixIndex

RUNNING_COST = 8  # what one decoding sequence counts for, in prompt tokens


@dataclasses.dataclass(frozen=True, slots=True)
class RouteQuestion:
    """One attempt to be placed. `fingerprint` is set once an earlier attempt has fixed it.

    Block hashes are computed once for each fingerprint that nodes have. `hash_for` computes those of a
    long prompt before the router asks, and lets other work run meanwhile.
    """

    request: Request
    fingerprint: Fingerprint | None = None
    avoid: frozenset[str] = frozenset()  # incarnations that just failed this request
    only: str = ""  # the incarnation that must take part in it
    _chains: dict[Fingerprint, HashChain] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    async def hash_for(self, nodes: Sequence[NodeView]) -> None:
        """Compute the hashes that these nodes would have its blocks under."""
        for node in of_model(self.request.model, nodes):
            await self._chain(node.fingerprint).finish()

    def hashes(self, fingerprint: Fingerprint) -> Sequence[bytes]:
        """Hashes of the full blocks, in order, as a node of this fingerprint names them."""
        chain = self._chain(fingerprint)
        chain.advance(len(self.request.token_ids))
        return chain.hashes

    def _chain(self, fingerprint: Fingerprint) -> HashChain:
        if fingerprint not in self._chains:
            self._chains[fingerprint] = HashChain(
                self.request.cache_root(fingerprint),
                self.request.token_ids,
                fingerprint.block_size,
                fingerprint.border(self.request.prompt_len),
            )
        return self._chains[fingerprint]

    @property
    def most_tokens(self) -> int:
        return self.request.prompt_len + self.request.params.max_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Weighed:
    """One candidate and its costs, in prompt tokens."""

    incarnation: str
    waiting: int
    uncached: int
    decoding: int

    @property
    def cost(self) -> int:
        return self.waiting + self.uncached + self.decoding


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """`decode` is None when `prefill` goes on by itself: a unified node, or a decode node that idles."""

    prefill: NodeView
    decode: NodeView | None
    reason: str


class Router(Protocol):
    def route(
        self, question: RouteQuestion, nodes: Sequence[NodeView], in_flight: Mapping[str, int]
    ) -> Decision | None:
        """Choose the nodes for an attempt; None while no complete way exists.

        `in_flight` corrects the nodes' loads by what has happened since they were read: prompt tokens per
        incarnation that this gateway has sent, less those that it has heard to be computed. Raises
        `ContextLengthExceeded` or `NeverFits` when nodes exist and none can ever hold it.
        """


class LeastLoadedRouter:
    """Chooses the least work before the first token; see the module."""

    def __init__(self, index: PrefixIndex, *, decode_prompt_tokens: int = 0) -> None:
        """`decode_prompt_tokens`: how many prompt tokens an idle decode node takes at most, 0: none."""
        self._index = index
        self._decode_prompt_tokens = decode_prompt_tokens

    def route(
        self, question: RouteQuestion, nodes: Sequence[NodeView], in_flight: Mapping[str, int]
    ) -> Decision | None:
        usable = [node for node in of_model(question.request.model, nodes) if node.usable]
        if question.fingerprint is not None:
            usable = [n for n in usable if n.fingerprint.mismatch(question.fingerprint) is None]
        if question.only:
            usable = _around(question.only, usable)
        check_fits(question, usable)
        usable = [node for node in usable if fits(question, node)]
        decoders = [node for node in usable if node.role == DECODE]
        first = [
            node
            for node in usable
            if node.role == UNIFIED or (node.role == PREFILL and _partners(node, decoders))
        ]
        first = [node for node in first if node.incarnation not in question.avoid] or first
        if not first:
            return None
        weighed = self._weigh(question, first, in_flight)
        best = weighed[0]
        idle = self._idle_decoder(question, decoders, first, min(one.cost for one in weighed), in_flight)
        if idle is not None:
            return idle
        prefill = next(node for node in first if node.incarnation == best.incarnation)
        decode = None
        if prefill.role == PREFILL:
            partners = _partners(prefill, decoders)
            partners = [n for n in partners if n.incarnation not in question.avoid] or partners
            decode = min(partners, key=lambda node: _as_partner(question, prefill, node))
        reason = (
            f"{best.waiting} tokens wait, {best.uncached} of {len(question.request.token_ids)} "
            f"not cached, {len(first)} candidates"
        )
        return Decision(prefill, decode, reason)

    def _idle_decoder(
        self,
        question: RouteQuestion,
        decoders: Sequence[NodeView],
        first: Sequence[NodeView],
        least: int,
        in_flight: Mapping[str, int],
    ) -> Decision | None:
        """The idle decode node where the prompt costs less than `least`, which it costs at one of `first`."""
        if not self._decode_prompt_tokens:
            return None
        prefill = [node for node in first if node.role == PREFILL]
        idle = [
            node
            for node in decoders
            if not node.load.running
            and node.incarnation not in question.avoid
            and question.only in ("", node.incarnation)
            and any(node in _partners(one, [node]) for one in prefill)
        ]
        if not idle:
            return None
        best = self._weigh(question, idle, in_flight)[0]
        node = next(node for node in idle if node.incarnation == best.incarnation)
        if best.cost > self._decode_prompt_tokens or best.cost + node.fingerprint.block_size >= least:
            return None
        reason = f"it decodes nothing: {best.cost} tokens to compute, {least} elsewhere"
        return Decision(node, None, reason)

    def _weigh(
        self, question: RouteQuestion, nodes: Sequence[NodeView], in_flight: Mapping[str, int]
    ) -> tuple[Weighed, ...]:
        held = self._held(question, nodes)
        slack = max(node.fingerprint.block_size for node in nodes)
        entries = {}
        for node in nodes:
            entries[node.incarnation] = Weighed(
                node.incarnation,
                max(0, node.load.waiting_tokens + in_flight.get(node.incarnation, 0)),
                len(question.request.token_ids) - held[node.incarnation],
                node.load.running * RUNNING_COST if node.role == UNIFIED else 0,
            )
        least = min(entry.cost for entry in entries.values())
        # By cost, but those within one block of the best by the spread.
        order = sorted(
            nodes,
            key=lambda node: (
                max(0, entries[node.incarnation].cost - least - slack),
                _spread(question.request.id, node),
            ),
        )
        return tuple(entries[node.incarnation] for node in order)

    def _held(self, question: RouteQuestion, nodes: Sequence[NodeView]) -> dict[str, int]:
        """Leading tokens in each node's prefix cache; the last one is always computed."""
        counts: dict[Fingerprint, dict[str, int]] = {}
        held = {}
        for node in nodes:
            fingerprint = node.fingerprint
            if fingerprint not in counts:
                counts[fingerprint] = self._index.leading_blocks(question.hashes(fingerprint))
            blocks = counts[fingerprint].get(node.incarnation, 0)
            held[node.incarnation] = min(blocks * fingerprint.block_size, len(question.request.token_ids) - 1)
        return held


def _around(only: str, nodes: Sequence[NodeView]) -> list[NodeView]:
    """This node, and those that it needs beside it."""
    named = [node for node in nodes if node.incarnation == only]
    beside = {PREFILL: DECODE, DECODE: PREFILL}.get(named[0].role) if named else None
    return named + [node for node in nodes if node.role == beside]


def of_model(model: ModelIdentity, nodes: Sequence[NodeView]) -> list[NodeView]:
    """The nodes whose tokens answer a prompt of this model."""
    return [node for node in nodes if model.mismatch(node.fingerprint) is None]


def fits(question: RouteQuestion, node: NodeView) -> bool:
    """Whether the node could ever hold it; the last token's KV is never stored."""
    if question.most_tokens > node.max_model_len:
        return False
    stored = len(question.request.token_ids) if node.role == PREFILL else question.most_tokens - 1
    return stored <= _pool_tokens(node)


def check_fits(question: RouteQuestion, nodes: Sequence[NodeView]) -> None:
    """Raise when there are nodes for a phase and not one could ever hold the request."""
    for phase in (PREFILL, DECODE):
        able = [node for node in nodes if node.role in (phase, UNIFIED)]
        if not able or any(fits(question, node) for node in able):
            continue
        request = question.request
        asked = f"prompt ({request.prompt_len} tokens) and max_tokens ({request.params.max_tokens})"
        longest = max(node.max_model_len for node in able)
        if question.most_tokens > longest:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {longest} tokens. However, {asked} exceed it.",
                param="max_tokens",
            )
        pool = max(_pool_tokens(node) for node in able)
        raise NeverFits(
            f"{asked} do not fit the largest KV pool of a {phase} node, {pool} tokens", param="prompt"
        )


def what_lacks(model: ModelIdentity, nodes: Sequence[NodeView]) -> str:
    """Say in one line why this model has no way, and what to do. Call it only when there is none."""
    usable = [node for node in of_model(model, nodes) if node.usable]
    prefill = [node for node in usable if node.role == PREFILL]
    decode = [node for node in usable if node.role == DECODE]
    if not usable:
        return _why_no_node(model, [node for node in nodes if node.usable])
    if not prefill or not decode:
        lacking = PREFILL if not prefill else DECODE
        return (
            f"no {lacking} node of {model.name!r} is here; start one with the same Redis address and prefix"
        )
    one, other = prefill[0], decode[0]
    differs = one.fingerprint.mismatch(other.fingerprint)
    assert differs is not None, "there is a way"
    return (
        f"no prefill and decode nodes that go together: {differs.field} is {differs.mine!r} at "
        f"{one.incarnation} and {differs.yours!r} at {other.incarnation}; start them with the same "
        "model, version and settings"
    )


def _why_no_node(model: ModelIdentity, others: Sequence[NodeView]) -> str:
    """`others` are usable and run other models. One of the same name explains most."""
    for node in others:
        differs = model.mismatch(node.fingerprint)
        if differs is not None and differs.field != "model":
            return (
                f"{node.incarnation} runs another {model.name!r}: {differs.field} is "
                f"{differs.yours!r} there and {differs.mine!r} here; start both from the same files"
            )
    names = sorted({node.fingerprint.model for node in others})
    there = f" (nodes run {', '.join(map(repr, names))})" if names else ""
    return f"no node of {model.name!r} is here{there}; start some with the same Redis address and prefix"


def longest_request(model: ModelIdentity, nodes: Sequence[NodeView]) -> int | None:
    """Prompt plus output that the roomiest node could hold; None when no node is there to ask."""
    lengths = [
        min(node.max_model_len, _pool_tokens(node) + 1)
        for node in of_model(model, nodes)
        if node.role in (DECODE, UNIFIED) and node.healthy
    ]
    return max(lengths, default=None)


def longest_context(model: ModelIdentity, nodes: Sequence[NodeView]) -> int | None:
    """The context of the node with the longest, whatever its pool; None when there is no node."""
    return max((node.max_model_len for node in of_model(model, nodes)), default=None)


def _pool_tokens(node: NodeView) -> int:
    return node.total_blocks * node.fingerprint.block_size


def _partners(prefill: NodeView, decoders: Sequence[NodeView]) -> list[NodeView]:
    """Decode nodes that could go on with what `prefill` computes; block sizes are converted."""
    return [node for node in decoders if node.fingerprint.mismatch(prefill.fingerprint) is None]


def _as_partner(question: RouteQuestion, prefill: NodeView, node: NodeView) -> tuple[int, bool, bytes]:
    """The order in which decode nodes are taken: fewest running sequences first, then those that need no
    conversion, which would make the prefill node send every block."""
    converts = node.fingerprint.block_size != prefill.fingerprint.block_size
    return node.load.running, converts, _spread(question.request.id, node)


def _spread(request: str, node: NodeView) -> bytes:
    """A different order of the nodes for each request, the same at every gateway."""
    return hashlib.blake2b(f"{request} {node.incarnation}".encode(), digest_size=8).digest()
