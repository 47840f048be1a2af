"""What both ends of a handoff share: its key, its settings, their effects, and the pools they need.

Owns the effects that the sans-io ends (handoff.py, intake.py) hand to their driver, and the
protocols that a node's block pool implements for them. Knows no pool, socket or tensor.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from common.wire.message import HandoffKey, Message
from common.wire.messages import Commit, Offer


@dataclasses.dataclass(frozen=True, slots=True)
class TransferSettings:
    """Times are in seconds. A timer repeats a message or starts a teardown; it never ends a lease."""

    credits: int = 16  # prompts that may be under way at once on one link
    repeat: float = 0.25  # an unanswered message is sent again after this long
    answer: float = 20.0  # silence about a handoff for this long tears the link down
    patience: float = 5.0  # an offer waits this long for room before it is denied; below `answer`
    quiet: float = 2.0  # the intake asks about a granted prompt after this much silence
    remembered: int = 4096  # terminal answers kept per link
    copy_blocks: int = 64  # blocks in one copy: an abort waits for so many at most
    copy: float = 60.0  # a copy that takes longer loses its link
    copies: int = 32  # copies at once, over all links
    copies_per_link: int = 2  # copies at once of one link, so that a stopped peer holds up no other
    digests: bool = True  # generations are always checked


# ── Blocks ───────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class ReadyBlock:
    """A computed block of a prompt: `index` in the prompt, `slot` in the sender's pool."""

    index: int
    slot: int
    generation: int
    digest: bytes  # b"" when digests are off


class Span(NamedTuple):
    """Consecutive positions in one block of the peer, and their place in one block of ours."""

    block: int  # of our own pool
    at: int  # position in that block
    start: int  # position in the peer's block
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One block to copy, from `slot` of the peer's pool into `block` of our own. Where the peer's
    blocks have another size, `spans` names the places, and `block` is the first of them."""

    index: int
    slot: int
    generation: int
    block: int
    fill: int  # 0: the whole slab; else a tail's filled positions
    digest: bytes  # what the content must have; b"": not checked
    seed: bytes  # what the digest is seeded with: the block hash, or a tail's identity
    spans: tuple[Span, ...] = ()


class BlockReferences(Protocol):
    """The sending node's pool: references keep a block's content in place."""

    def acquire(self, blocks: Sequence[int], /) -> None: ...

    def release(self, blocks: Sequence[int], /) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class Reservation:
    """Room for one whole prompt. `blocks[i]` takes index i; indexes not in `missing` are cached
    here already and referenced. The caller of `reserve` owns all of it until adopt or discard."""

    blocks: tuple[int, ...]
    missing: tuple[int, ...]


class IntakePool(Protocol):
    """The receiving node's pool, called on the driver's thread only."""

    def reserve(self, offer: Offer, /) -> Reservation | None:
        """Reserve room for the whole prompt. None if there is none now, `NeverFits` if there never is.

        The pool may take only those blocks from its cache that `offer.block_hashes` names; the offer
        of a peer with another block size has none. Missing blocks belong to the caller alone until
        they are discarded, and nobody reads them. The intake asks again and again about the first
        offer that waits, which stands in the node's line for room until it has room or is withdrawn.
        """

    def withdraw(self, offer: Offer, /) -> None:
        """Take an offer without room out of the line. It may never have been asked about."""

    def landed(self, reservation: Reservation, piece: Piece, /) -> None:
        """`piece.block` holds its checked content. The pool may publish a full block as prefix cache,
        under `piece.seed`."""

    def adopt(self, reservation: Reservation, /) -> None:
        """Everything has landed: the references now belong to the sequence that decodes it."""

    def discard(self, reservation: Reservation, /) -> None:
        """The handoff failed and no copy runs: all references go back."""


# ── Effects: what an end asks of its driver ──────────────────────────────────────────────────────


class Outcome(enum.Enum):
    """How a handoff ended, the same word at both ends."""

    ADOPTED = "adopted"
    DENIED = "denied"
    FAILED = "failed"  # the peer, or a check, gave it up
    CANCELLED = "cancelled"  # this end gave it up
    LINK_LOST = "link_lost"


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    link: str
    message: Message


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Copy all pieces, check each, then report `number` with `Intake.copied`."""

    key: HandoffKey
    number: int
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Granted:
    """Handoff side: the peer has room; `missing` indexes are wanted, others it has."""

    key: HandoffKey
    missing: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Adopted:
    """Intake side: the sequence is here, whole and checked; decode it.

    `offer` is in blocks of this node; the intake has checked or computed each of its hashes.
    """

    key: HandoffKey
    offer: Offer
    commit: Commit
    reservation: Reservation
    waited: float  # seconds from Commit to here: what computing did not hide of the transfer


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """Either side: the handoff is over and holds nothing any more."""

    key: HandoffKey
    sending: bool  # which end: True the handoff, False the intake
    outcome: Outcome
    reason: str  # a PdqError code or a Deny reason; "" for adopted


@dataclasses.dataclass(frozen=True, slots=True)
class Teardown:
    """The peer does not answer: close the link, then report `link_lost`."""

    link: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class ContinueCheck:
    """Call `Intake.continue_check` soon, but after other work: a long offer is checked in pieces."""


Effect = Send | Copy | Granted | Adopted | Ended | Teardown | ContinueCheck
