"""Every message of the system, from top to bottom in the order they travel.

Owns the field names and meaning of each message, who sends it and who receives it, and what a
duplicate or late copy means. Knows nothing of sockets, of Redis, or of how bytes look (codec.py).

Every message about a request bears `request` (its id), `attempt` (numbered from 1; only the
gateway that holds the client raises it), `choice` (0 to n-1) and, between nodes, `link`: the id of
the connection, new at each reconnect. A message of a link that is no longer the current one is
late by definition: it is counted and dropped.

    gateway ──Dispatch (Redis stream)──▶ prefill          Dispatch also goes to a unified node
    prefill ──Hello──▶ decode, decode ──Welcome | Refuse──▶ prefill, prefill ──(Closed──▶) decode
    prefill ──Offer──▶ decode ──Grant | Deny──▶ prefill
    prefill ──Blocks…──▶ decode          (places, generations, digests: decode pulls the bytes)
    prefill ──Tail──▶ decode             (a prompt that ends inside a block)
    decode ──Pull──▶ prefill ──Slabs, Proved──▶ decode    (tcp only, on a socket of their own)
    prefill ──Tokens (the first)──▶ gateway
    prefill ──Commit──▶ decode ──Ack──▶ prefill, both ──TookOver──▶ gateway
    decode ──Tokens──▶ gateway ──TokensAck──▶ decode
    gateway ──HoldsQuery──▶ node ──Tokens | TookOver | Failed──▶ gateway
    node ──CacheEvents──▶ gateway ──CacheQuery──▶ node ──CacheContent──▶ gateway
    anyone ──Abort──▶ anyone, decode ──Release──▶ prefill, gateway ──Cancel──▶ nodes
    everyone ──Open, Beat…, Over──▶ everyone it has a link with
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from common.kv_layout import Fingerprint
from common.request import Request
from common.wire.message import (
    NUMBERED,
    GatewayMessage,
    HandoffMessage,
    LinkMessage,
    Message,
    NodeMessage,
    PeerMessage,
    TransportMessage,
    message,
)

# ── The request, as it lies in Redis ─────────────────────────────────────────────────────────────


@message(1)
class Dispatch(Message):
    """gateway → prefill or unified node, through the node's Redis stream. One attempt of a request.

    Tokens already delivered to the client are per choice, so a retry dispatches each choice by itself
    (`choices` lists which choices this attempt computes). Duplicate: `claim` lets one win.
    """

    request: Request
    attempt: int
    choices: tuple[int, ...]
    decode_node: str  # provisional choice, an incarnation; "" when the node decides or decodes
    decode_endpoint: str
    alone: bool = False  # suspected of a node's death: to be computed in steps of its own at first
    node: str = ""  # the incarnation that a person wants it computed by; it moves to no other


# ── Between two nodes: opening a link ────────────────────────────────────────────────────────────


@message(10)
class Hello(LinkMessage):
    """handoff side → intake side, first on a new link, which is for one transport. Duplicate:
    answered again, same answer."""

    node: str  # incarnation
    fingerprint: Fingerprint
    slab_bytes: int
    transports: tuple[str, ...]  # this one, and what will be tried after it
    proofs: dict[str, bytes]  # of this one, what the other end must be able to confirm
    tried: tuple[str, ...]  # why each before it was not taken, for `pdq nodes`


@message(11)
class Welcome(LinkMessage):
    """intake → handoff: the link is open, over `transport`. Late: dropped."""

    node: str
    transport: str
    reason: str  # why this transport and not a faster one, for `pdq nodes`
    credits: int  # prompts that may be offered at once


@message(12)
class Refuse(LinkMessage):
    """intake → handoff: not compatible; `field` says which part of the fingerprint differs, or
    "transport": then the next may be tried, on another link."""

    node: str
    field: str
    mine: str
    yours: str


@message(13)
class Closed(LinkMessage):
    """handoff side → intake side, where the connection goes on: nobody waits for this link any more,
    and the intake closes its end, opened or not. Duplicate, unknown: dropped."""


# ── Between two nodes: one handoff ───────────────────────────────────────────────────────────────
#
# kv_transfer/README.md has the rules and the state tables of both ends. An intake that is asked
# about a handoff it has ended repeats its terminal answer (Deny, Ack, Abort or Release).


@message(20)
class Offer(HandoffMessage):
    """handoff → intake: all that is needed to reserve room for one choice of one attempt.

    `request.token_ids` are those whose KV is offered, `block_hashes` those of all their full blocks;
    `tail_fill` positions follow them.
    Repeated until Grant, Deny or Abort. Duplicate: answered with a Grant of what is missing still,
    or the terminal answer. Late (after Abort): the terminal answer again, nothing is reserved.
    """

    request: Request
    block_hashes: tuple[bytes, ...]
    tail_fill: int
    waited_ms: int  # how long the request has waited already: among equals the oldest goes first
    alone: bool = False  # as Dispatch says


@message(21)
class Grant(HandoffMessage):
    """intake → handoff: room for the whole prompt is reserved; `missing` are the indexes to announce.

    An index counts blocks of this prompt from 0; the tail's index follows the last full block's.
    Sent again when something seems lost, then `missing` names what was not announced yet: the
    handoff side announces those of them that are computed once more. For a handoff that is not
    going on (any more): answered with Abort, so that no reservation outlives its sender's memory.
    """

    missing: tuple[int, ...]


@message(22)
class Deny(HandoffMessage):
    """intake → handoff: no, terminally, for this offer; another node is chosen. Duplicate: ignored."""

    reason: str  # out_of_blocks | overloaded | draining | aborted | never_fits | malformed


@message(23)
class Blocks(HandoffMessage):
    """handoff → intake: these blocks are computed, and lie still until a terminal answer.

    `slots` are block ids in the sender's pool and `generations` their generation counters (even:
    nobody writes). `digests` are xxh3-128 of each slab without a draft model's part, seeded with its
    block hash; empty when digests are switched off. Duplicate: indexes that were announced already are
    skipped.
    """

    indexes: tuple[int, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[bytes, ...]


@message(24)
class Tail(HandoffMessage):
    """handoff → intake: the last, partly filled block; only its first `fill` positions count.

    `parent` is the hash of the block before it, empty if there is none. Duplicate: skipped. A tail
    has no block hash; its digest, over the filled positions only, is seeded with `parent` (or the
    root that both ends know) and `token_ids`.
    """

    index: int
    parent: bytes
    token_ids: tuple[int, ...]
    fill: int
    slot: int
    generation: int
    digest: bytes  # empty when digests are switched off


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of one token: its own, its rank from 1, and the most likely alternatives."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@message(25)
class Commit(HandoffMessage):
    """handoff → intake: all is announced; decode may go on from `first_token`, at `position`: the
    first of a prompt, the last of a sequence that moves.

    Repeated by the handoff side until Ack or Abort. Duplicate while blocks are still being
    copied: answered with Grant (what was not announced: the repair of a lost Blocks); afterwards
    with Ack again, even after the sequence has finished.
    """

    position: int
    first_token: int
    logprobs: TokenLogprobs | None
    blocks: int  # how many indexes the prompt has, tail included: a check
    draft_positions: int = 0  # of how many of its positions the draft model's KV is in the slabs, too


@message(26)
class Ack(HandoffMessage):
    """intake → handoff: every block is checked and owned here; the lease ends. Duplicate: ignored."""


@message(27)
class Abort(HandoffMessage):
    """either end → the other: this handoff is over.

    From the intake it is an answer, terminal for the lease: sent only when no copy runs any more.
    From the handoff side it is a question, repeated until a terminal answer comes (Release, or the
    Ack, Deny or Abort that crossed it): the lease stays until then. Duplicate: answered again.
    """

    reason: str


@message(28)
class Release(HandoffMessage):
    """intake → handoff: the answer to Abort; I touch nothing of it any more. Duplicate: ignored."""


# ── Between two nodes: the bytes, over tcp ───────────────────────────────────────────────────────
#
# On a socket that belongs to one link and dies with it. shm has no messages: the reader copies.


@message(60)
class Pull(TransportMessage):
    """reader → source: send me these slabs. `number` counts pulls of a link, from 0.

    Served only with the link's `token` and only for blocks leased to that link. `fill` 0 asks for
    whole slabs, more for that many positions of one tail; without `with_draft` each is without the
    draft model's part. A duplicate is served again.
    """

    token: bytes
    number: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    fill: int
    with_draft: bool = True


@message(61)
class Slabs(TransportMessage):
    """source → reader: the slabs of one Pull follow; none, and a code, if it is refused."""

    number: int
    refused: str  # "" | stale_block | too_many


@message(62)
class Proved(TransportMessage):
    """source → reader, when they have left: `unchanged` says that no generation of Pull `number`
    changed until then. Nothing counts as copied before."""

    number: int
    unchanged: bool


# ── Node to gateway ──────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens of one choice in one step: `token_ids[i]` is at absolute position `position + i`.

    `logprobs` is empty or one entry per token. `finish_reason` is "" while the choice goes on. For the step
    `drafted` tokens had been guessed, and the first `accepted` of `token_ids` are among them.
    """

    request: str
    attempt: int
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    drafted: int = 0
    accepted: int = 0

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + len(self.token_ids)


@message(30)
class Tokens(NodeMessage):
    """node → gateway, one message per gateway and step. The gateway orders by position; duplicates
    of a position are dropped (they are equal by construction; a difference is counted as an error).
    Sent again on a new link from the first position that was not acknowledged."""

    runs: tuple[TokenRun, ...]


@message(31)
class TookOver(NodeMessage):
    """decode → gateway: from `position` on, tokens come from me; and handoff side → gateway, of the
    node that sent Ack, which may die before it says so itself. Duplicate, or of a lower position
    than the last one: ignored. Tokens before `position` are the former holder's to send."""

    request: str
    attempt: int
    choice: int
    position: int


@message(32)
class Stage(NodeMessage):
    """node → gateway: a request entered `state` here; `durations` are seconds by stage name, from
    this node's monotonic clock. Late: merged into the record, which only moves forward."""

    request: str
    attempt: int
    choice: int
    state: str
    durations: dict[str, float]
    cached_tokens: int  # prompt tokens taken from the prefix cache here


@message(33)
class Failed(NodeMessage):
    """node → gateway: this attempt is over here; the gateway decides whether there is another.

    `retryable` is false for what would fail anywhere (invalid request).
    """

    request: str
    attempt: int
    choice: int
    code: str
    message: str
    retryable: bool


@message(34)
class CacheEvents(NodeMessage):
    """node → gateway: what its prefix cache gained and lost since message `number - 1`.

    Numbers are consecutive from 1 for each incarnation. Duplicate: dropped; a gap: the gateway
    sends CacheQuery. A wrong idea of a cache costs time, never correctness.
    """

    number: int
    stored: tuple[bytes, ...]
    evicted: tuple[bytes, ...]


@message(35)
class CacheContent(NodeMessage):
    """node → gateway, the answer to CacheQuery: all block hashes cached after events `number`."""

    number: int
    blocks: tuple[bytes, ...]


# ── Gateway to node ──────────────────────────────────────────────────────────────────────────────


@message(40)
class TokensAck(GatewayMessage):
    """gateway → node: for each (request, attempt, choice) all positions below `below` arrived.

    Cumulative, so a lost or late one does no harm.
    """

    acks: tuple[tuple[str, int, int, int], ...]  # request, attempt, choice, below


@message(43)
class HoldsQuery(GatewayMessage):
    """gateway → node: on a new link, when one of two ends, and when a choice has been quiet for long.

    For each (request, attempt, choice, below): all positions below `below` have arrived, which
    acknowledges them, and what follows is expected from this node. It sends again what is not
    acknowledged of these. Where it has nothing, and computes nothing, it repeats its last word,
    TookOver or Failed; if there is none, or another node goes on from a later position only, it says
    Failed: `not_held`. Duplicate: answered again. Late: its answer is about an attempt, or a holder,
    that is no longer the current one, and dropped.
    """

    choices: tuple[tuple[str, int, int, int], ...]


@message(41)
class Cancel(GatewayMessage):
    """gateway → node: free everything of these choices in attempts up to `attempt`. Said again when
    more of them comes. Duplicate, unknown: ignored."""

    request: str
    attempt: int
    reason: str
    choices: tuple[int, ...] = ()  # none named: all


@message(42)
class CacheQuery(GatewayMessage):
    """gateway → node, on a new link and after a gap: what is in your prefix cache?"""


# ── On every link ────────────────────────────────────────────────────────────────────────────────


@message(52)
class Open(PeerMessage):
    """who connects → who listens, once, first on a new link, whose id is in the routing id: `node`
    opens it to `to`. Answered with Beat, or by another incarnation at that address with Over."""

    to: str


@message(50)
class Beat(PeerMessage):
    """everyone → everyone it has a link with, once per beat interval: liveness is progress.

    `steps` is the engine's step counter and `busy` whether it has work: an engine that has work
    and does not step is dead though its sockets answer.
    """

    steps: int
    busy: bool


@message(53)
class Over(PeerMessage):
    """either end → the other: this link is over here, and nothing more of it will be read.

    Said when an end gives a link up, and again in answer to whatever arrives of a link that is not
    known (any more), but Open. Never answered. Late, duplicate: dropped.
    """

    reason: str


@message(51)
class Goodbye(PeerMessage):
    """a node or gateway → its peers: this incarnation ends in order. Missing: link loss says it."""


MESSAGES: Mapping[int, type[Message]] = NUMBERED
"""Every message by its number, in the order of this file."""
