"""Blocks of one size into blocks of another: an intake and a reader, real memory, every byte checked.

A position's content is a function of its token, its position, its segment and its byte. What lands
is looked at twice: a block when it is said to be whole, and all of the prompt when it is adopted.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from common.errors import PdqError
from common.kv_layout import Fingerprint, KVLayout, root_hash
from common.wire.message import HandoffKey
from common.wire.messages import Ack, Blocks, Commit, Deny, Grant, Offer, Tail
from kv_transfer.digests import tail_seed
from kv_transfer.intake import Intake
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import (
    Adopted,
    Copy,
    Effect,
    Ended,
    Outcome,
    Piece,
    Reservation,
    Send,
    TransferSettings,
)
from kv_transfer.transports.base import Target
from kv_transfer.transports.converting import ConvertingReader
from kv_transfer.transports.shm import ShmReader, ShmSource
from tests.support.asked import a_request
from tests.support.hashes import chain_hashes

SIZES = (1, 3, 8, 16, 32, 48, 64)
POSITIONS = 576  # of either pool: room for two of the longest prompts, and some
LONGEST = 200
UNFILLED = 0xEE


def layout(block_size: int) -> KVLayout:
    """Two layers as usual, and one whose K and V are not alike; then a layer in 8 bits, with scales."""
    same, scaled = (
        KVLayout.paged_attention(
            num_layers=layers, num_kv_heads=2, head_dim=4, block_size=block_size, dtype=dtype
        )
        for layers, dtype in ((3, "bfloat16"), (1, "float8_e4m3fn"))
    )
    *usual, odd = same.segments
    odd = dataclasses.replace(odd, shape=(block_size, 1, 12), head_end=1)
    behind = KVLayout(block_size, (*usual, odd)).with_draft(scaled)
    return dataclasses.replace(behind, num_draft=0)


def content(layout: KVLayout, tokens: Sequence[int], start: int) -> list[np.ndarray]:
    """For each segment the bytes of positions `start` on, `[positions, bytes of one]`."""
    result = []
    for number, segment in enumerate(layout.segments):
        row = segment.num_bytes // layout.block_size
        positions = np.arange(start, start + len(tokens))[:, None]
        seeds = np.asarray(tokens)[:, None] * 7919 + positions * 104729 + number * 1299709
        result.append(((seeds + np.arange(row) * 15485863) >> 3).astype(np.uint8))
    return result


def rows(memory: PoolMemory, layout: KVLayout, block: int) -> list[np.ndarray]:
    """For each segment of a block its bytes, `[block_size, bytes of a position]`."""
    slab = memory.slabs[block].numpy()
    return [slab[s.offset : s.offset + s.num_bytes].reshape(layout.block_size, -1) for s in layout.segments]


class Receiver:
    """A pool whose blocks are handed out in any order, and checked when they land."""

    def __init__(self, block_size: int, chance: random.Random) -> None:
        self.layout, self.chance = layout(block_size), chance
        count = -(-POSITIONS // block_size)
        self.memory = HostPoolMemory(count, self.layout.slab_bytes, warm=False)
        self.target = Target(self.memory, self.layout)
        self.free = list(range(count))
        self.fingerprint = Fingerprint("m", "r", self.layout.describe(), "n", block_size)
        self.offer: Offer | None = None
        self.cache: dict[bytes, int] = {}  # of the reservation that is held
        self.num_landed = 0

    def reserve(self, offer: Offer) -> Reservation | None:
        assert offer.block_hashes == (), "delta is off: nothing may come from the cache"
        size = self.layout.block_size
        assert offer.tail_fill == len(offer.request.token_ids) % size
        count = -(-len(offer.request.token_ids) // size)
        self.chance.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count
        for block in taken:
            self.memory.begin_write(block)
            self.memory.slabs[block] = UNFILLED
        self.offer, self.cache = offer, {}
        return Reservation(tuple(taken), tuple(range(count)))

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        assert self.offer is not None
        size = self.layout.block_size
        first = piece.index * size
        tokens = self.offer.request.token_ids[first : first + size]
        assert piece.block == reservation.blocks[piece.index]
        assert piece.fill == (len(tokens) if len(tokens) < size else 0)
        self.check(piece.block, tokens, first)
        self.num_landed += 1
        if not piece.fill:
            assert piece.seed not in self.cache
            self.cache[piece.seed] = piece.index

    def check(self, block: int, tokens: Sequence[int], first: int) -> None:
        """Every byte of a block: what its tokens say, and nothing behind them."""
        there, here = content(self.layout, tokens, first), rows(self.memory, self.layout, block)
        for wanted, found in zip(there, here, strict=True):
            assert (found[: len(tokens)] == wanted).all()
            assert (found[len(tokens) :] == UNFILLED).all()

    def adopt(self, reservation: Reservation) -> None:
        """Every position that the sequence will read; and what may be found again, by which hash."""
        assert self.offer is not None
        size, tokens = self.layout.block_size, self.offer.request.token_ids
        for index, block in enumerate(reservation.blocks):
            self.check(block, tokens[index * size : (index + 1) * size], index * size)
        root = self.offer.request.cache_root(self.fingerprint)
        hashes = chain_hashes(root, tokens, size, self.offer.request.prompt_len)
        assert self.cache == {block_hash: index for index, block_hash in enumerate(hashes)}
        assert self.num_landed == len(reservation.blocks)
        self.discard(reservation)

    def discard(self, reservation: Reservation) -> None:
        self.free += reservation.blocks
        self.num_landed = 0


class Sender:
    """A pool of another block size, in which a prompt lies at any place."""

    def __init__(self, block_size: int, chance: random.Random) -> None:
        self.layout, self.chance = layout(block_size), chance
        self.memory = HostPoolMemory(-(-POSITIONS // block_size), self.layout.slab_bytes, warm=False)
        self.source = ShmSource(self.memory)

    def fill(self, offer: Offer, root: bytes) -> tuple[list[int], list[bytes]]:
        """The blocks that hold the prompt, and what each digest is seeded with."""
        size, tokens = self.layout.block_size, offer.request.token_ids
        count = -(-len(tokens) // size)
        blocks = self.chance.sample(range(self.memory.num_blocks), count)
        seeds = []
        for index, block in enumerate(blocks):
            part = tokens[index * size : (index + 1) * size]
            self.memory.begin_write(block)
            self.memory.slabs[block] = torch.randint(0, 256, (self.layout.slab_bytes,)).to(torch.uint8)
            for wanted, found in zip(
                content(self.layout, part, index * size), rows(self.memory, self.layout, block), strict=True
            ):
                found[: len(part)] = wanted
            if len(part) == size:
                seeds.append(offer.block_hashes[index])
                self.memory.seal(block, seeds[-1])
            else:
                parent = offer.block_hashes[-1] if offer.block_hashes else root
                seeds.append(tail_seed(parent, part))
                self.memory.seal(block, seeds[-1], self.layout.ranges(len(part)))
        return blocks, seeds


class Handover:
    """One prompt from a sender to the intake of a receiver, over a reader that converts."""

    def __init__(
        self, sender: Sender, receiver: Receiver, reader: ConvertingReader, chance: random.Random, name: str
    ) -> None:
        self.sender, self.receiver, self.reader, self.chance = sender, receiver, reader, chance
        self.key = HandoffKey("link", name, 1, 0)
        size, mine = sender.layout.block_size, receiver.fingerprint
        self.intake = Intake(receiver, mine, TransferSettings(copy_blocks=5))
        self.intake.open_link("link", 4, dataclasses.replace(mine, block_size=size))
        tokens = tuple(chance.randrange(2**32) for _ in range(chance.randint(1, LONGEST)))
        border = chance.choice((len(tokens), chance.randint(1, len(tokens))))
        self.root = root_hash(dataclasses.replace(mine, block_size=size), "salt")
        self.offer = Offer(
            self.key,
            a_request(tokens, name=name, prompt_len=border, cache_salt="salt"),
            tuple(chain_hashes(self.root, tokens, size, border)),
            len(tokens) % size,
            0,
        )
        self.blocks, self.seeds = sender.fill(self.offer, self.root)
        self.sent: list[object] = []
        self.ended: Adopted | Ended | None = None

    def say(self, message: Offer | Blocks | Tail | Commit) -> None:
        self.perform(self.intake.receive(message, now=0.0))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Copy):
                error = ""
                try:
                    self.reader.pull(effect.pieces)
                except PdqError as failure:
                    error = failure.code
                self.perform(self.intake.copied(effect.number, error, now=0.0))
            elif isinstance(effect, Send):
                self.sent.append(effect.message)
            elif isinstance(effect, (Adopted, Ended)):
                self.ended = effect

    def announcements(self) -> Iterator[Blocks | Tail]:
        """The computed blocks in pieces of any size, the tail last; or all in any order."""
        memory, full = self.sender.memory, list(range(len(self.offer.block_hashes)))
        if self.chance.random() < 0.5:
            self.chance.shuffle(full)
        places = [(self.blocks[i], int(memory.generations[self.blocks[i]])) for i in full]
        start, messages = 0, []
        while start < len(full):
            end = start + self.chance.randint(1, 9)
            part = slice(start, end)
            messages.append(
                Blocks(
                    self.key,
                    tuple(full[part]),
                    tuple(slot for slot, _ in places[part]),
                    tuple(generation for _, generation in places[part]),
                    tuple(memory.digests[slot] for slot, _ in places[part]),
                )
            )
            start = end
        if fill := self.offer.tail_fill:
            slot = self.blocks[-1]
            parent = self.offer.block_hashes[-1] if self.offer.block_hashes else b""
            tail = Tail(
                self.key,
                len(self.offer.block_hashes),
                parent,
                self.offer.request.token_ids[-fill:],
                fill,
                slot,
                int(memory.generations[slot]),
                memory.digests[slot],
            )
            messages.insert(self.chance.choice((len(messages), 0)), tail)  # type: ignore[arg-type]
        yield from messages

    def run(self) -> None:
        commit = Commit(self.key, len(self.offer.request.token_ids), 5, None, len(self.blocks))
        self.say(self.offer)
        assert self.sent == [Grant(self.key, tuple(range(len(self.blocks))))], "all is wanted"
        for message in self.announcements():
            self.say(message)
            if self.chance.random() < 0.2:
                self.say(message)  # a duplicate changes nothing
        self.say(commit)


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Sender, Receiver, ConvertingReader]]:
    theirs, ours = request.param
    chance = random.Random(theirs * 1000 + ours)
    sender, receiver = Sender(theirs, chance), Receiver(ours, chance)
    proof = sender.source.open_link("link")
    reader = ConvertingReader.open(
        ShmReader.open, "link", proof, receiver.target, theirs, 6 * layout(16).slab_bytes
    )
    yield sender, receiver, reader
    reader.close()
    sender.source.close()
    sender.memory.close()
    receiver.memory.close()


PAIRS = [pair for pair in itertools.product(SIZES, SIZES) if pair[0] != pair[1]]
every_pair = pytest.mark.parametrize(
    "ends", PAIRS, indirect=True, ids=[f"{theirs} to {ours}" for theirs, ours in PAIRS]
)


@every_pair
def test_every_position_of_every_prompt_is_where_it_belongs(
    ends: tuple[Sender, Receiver, ConvertingReader],
) -> None:
    sender, receiver, reader = ends
    for number in range(12):
        handover = Handover(sender, receiver, reader, receiver.chance, f"r{number}")
        handover.run()
        assert isinstance(handover.ended, Adopted)
        assert handover.offer is not None
        adopted, sent = handover.ended.offer, handover.offer
        ours, length = receiver.fingerprint, len(sent.request.token_ids)
        own = chain_hashes(
            root_hash(ours, "salt"), sent.request.token_ids, ours.block_size, sent.request.prompt_len
        )
        assert adopted == dataclasses.replace(
            sent, block_hashes=tuple(own), tail_fill=length % ours.block_size
        ), "in blocks of this node; all else is as it was offered"
        assert isinstance(handover.sent[-1], Ack)
    assert sorted(receiver.free) == list(range(receiver.memory.num_blocks))


@every_pair
def test_what_is_corrupt_or_rewritten_fails_the_attempt_and_is_in_no_block_that_counts(
    ends: tuple[Sender, Receiver, ConvertingReader],
) -> None:
    """`landed` looks at every block that is said to be whole; the next prompt arrives."""
    sender, receiver, reader = ends
    codes = set()
    for number in range(6):
        handover = Handover(sender, receiver, reader, receiver.chance, f"r{number}")
        bad = receiver.chance.choice(handover.blocks)
        if number % 2:
            sender.memory.slabs[bad][0] ^= 1
        else:
            announced = list(handover.announcements())
            handover.announcements = lambda announced=announced: iter(announced)  # type: ignore[method-assign]
            sender.memory.begin_write(bad)
        handover.run()
        assert isinstance(handover.ended, Ended)
        assert handover.ended.outcome is Outcome.FAILED
        codes.add(handover.ended.reason)
        assert sorted(receiver.free) == list(range(receiver.memory.num_blocks))
    assert codes == {"digest_mismatch", "stale_block"}
    handover = Handover(sender, receiver, reader, receiver.chance, "last")
    handover.run()
    assert isinstance(handover.ended, Adopted)


@pytest.mark.parametrize("ends", [(16, 32)], indirect=True)
def test_an_offer_in_hashes_of_the_wrong_size_is_malformed(
    ends: tuple[Sender, Receiver, ConvertingReader],
) -> None:
    """The hashes must be those of the sender's size: what the receiver would make is not it."""
    sender, receiver, reader = ends
    handover = Handover(sender, receiver, reader, receiver.chance, "r")
    tokens = tuple(range(64))
    own = chain_hashes(root_hash(receiver.fingerprint, "salt"), tokens, 32, 64)
    request = dataclasses.replace(handover.offer.request, token_ids=tokens, prompt_len=64)
    handover.say(dataclasses.replace(handover.offer, request=request, tail_fill=0, block_hashes=tuple(own)))
    assert handover.sent == [Deny(handover.key, "malformed")]
