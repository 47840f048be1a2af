"""The tables of both ends: complete, true to the README, and what messages out of order mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kv_transfer
from common.errors import MalformedMessage, NeverFits
from common.kv_layout import HASHED_AT_ONCE
from common.wire.codec import decode, encode
from common.wire.message import HandoffKey, Message
from common.wire.messages import (
    Abort,
    Ack,
    Blocks,
    Commit,
    Deny,
    Grant,
    Offer,
    Proved,
    Pull,
    Release,
    Slabs,
    Tail,
)
from kv_transfer import handoff, intake
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import ContinueCheck, Copy, Ended, Piece, ReadyBlock, Reservation, Send
from tests.support.asked import a_request
from tests.support.protocol.model import FINGERPRINT, ROOT, offer_of
from tests.support.protocol.world import SETTINGS

README = Path(kv_transfer.__file__).with_name("README.md").read_text()
KEY = HandoffKey("l", "r", 1, 0)
TOKENS = (1, 2, 3)  # one full block and a tail


class Endless:
    """An intake pool that always has room, and holds nothing yet; or one that never has."""

    def __init__(self, room: bool = True, limit: int = 100) -> None:
        self.room, self.limit, self.taken = room, limit, 0

    def acquire(self, blocks: list[int]) -> None: ...

    def release(self, blocks: list[int]) -> None: ...

    def reserve(self, offer: Offer) -> Reservation | None:
        if len(offer.request.token_ids) > self.limit:
            raise NeverFits("more blocks than the pool has")
        if not self.room:
            return None
        count = len(offer.block_hashes) + (offer.tail_fill > 0)
        self.taken += 1
        return Reservation(tuple(range(count)), tuple(range(count)))

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None: ...

    def adopt(self, reservation: Reservation) -> None:
        self.taken -= 1

    def discard(self, reservation: Reservation) -> None:
        self.taken -= 1


def an_intake(room: bool = True, limit: int = 100) -> tuple[Intake, Endless]:
    pool = Endless(room, limit)
    end = Intake(pool, FINGERPRINT, SETTINGS)
    end.open_link("l", 3)
    return end, pool


def said(effects: list) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def offer(tokens: tuple[int, ...] = TOKENS, request: str = "r") -> Offer:
    return offer_of(HandoffKey("l", request, 1, 0), tokens)


def blocks(*indexes: int) -> Blocks:
    count = len(indexes)
    return Blocks(KEY, indexes, (5,) * count, (2,) * count, (bytes(16),) * count)


@pytest.mark.parametrize("end", [handoff, intake])
def test_every_action_exists_and_every_state_is_left(end) -> None:
    owner = Handoff if end is handoff else Intake
    for action in {action for _, action in end.TABLE.values()}:
        assert callable(getattr(owner, "_" + action))
    for state in end.State:
        leaves = [after for (before, _), (after, _) in end.TABLE.items() if before is state]
        assert (state is end.State.ENDED) == (not leaves)
        if leaves:
            assert (state, end.Event.LINK_LOST) in end.TABLE


@pytest.mark.parametrize("end", [handoff, intake])
def test_the_readme_has_the_table_of_the_code(end) -> None:
    rows = [
        f"| {state.value} | {event.value} | {after.value} | {action.replace('_', ' ')} |"
        for (state, event), (after, action) in end.TABLE.items()
    ]
    assert "\n".join(rows) in README


def test_a_duplicate_offer_is_answered_with_the_same_grant_and_reserves_once() -> None:
    end, pool = an_intake()
    first = said(end.receive(offer(), now=0))
    assert first == said(end.receive(offer(), now=1)) == [Grant(KEY, (0, 1))]
    assert pool.taken == 1


def test_an_offer_after_its_abort_reserves_nothing() -> None:
    end, pool = an_intake()
    assert said(end.receive(Abort(KEY, "cancelled"), now=0)) == [Release(KEY)]
    assert said(end.receive(offer(), now=1)) == [Release(KEY)]
    assert pool.taken == 0


def test_a_choice_that_was_denied_is_another_handoff_when_it_is_asked_for_again() -> None:
    end, pool = an_intake(room=False)
    end.receive(offer(), now=0)
    denied = Deny(KEY, "out_of_blocks")
    assert said(end.tick(now=10)) == [denied]
    pool.room = True
    assert said(end.receive(offer(), now=10)) == [denied], "a late copy reserves nothing"
    again = dataclasses.replace(KEY, ask=2)
    assert said(end.receive(offer_of(again, TOKENS), now=11)) == [Grant(again, (0, 1))]
    assert said(end.receive(Abort(KEY, "late"), now=12)) == [denied]
    assert pool.taken == 1


def test_a_lost_blocks_message_is_asked_for_when_commit_comes() -> None:
    end, _ = an_intake()
    end.receive(offer(), now=0)
    commit = Commit(KEY, 3, 9, None, 2)
    assert said(end.receive(commit, now=1)) == [Grant(KEY, (0, 1))]


def test_blocks_of_an_unknown_handoff_are_answered_with_abort() -> None:
    end, _ = an_intake()
    assert said(end.receive(blocks(0), now=0)) == [Abort(KEY, "unknown")]


@pytest.mark.parametrize(
    "message",
    [
        blocks(1),
        blocks(-1),
        Blocks(KEY, (0,), (), (2,), ()),
        Blocks(KEY, (0,), (1,), (2,), (b"short",)),
        Tail(KEY, 1, b"other", (3,), 1, 5, 2, b""),
        Tail(KEY, 0, b"", (3,), 1, 5, 2, b""),
        Commit(KEY, 3, 9, None, 7),
        Commit(KEY, 2, 9, None, 2),
    ],
)
def test_a_peer_that_breaks_a_rule_loses_its_attempt_only(message: Message) -> None:
    end, pool = an_intake()
    end.receive(offer(), now=0)
    assert said(end.receive(message, now=1)) == [Abort(KEY, "protocol_error")]
    assert pool.taken == 0
    assert said(end.receive(offer(request="next"), now=2))[0].missing == (0, 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Offer(KEY, a_request(TOKENS), (ROOT,), 1, 0), "malformed"),
        (Offer(KEY, a_request(TOKENS), (), 1, 0), "malformed"),
        (Offer(KEY, a_request(()), (), 0, 0), "malformed"),
        (Offer(KEY, a_request((-1,)), (), 1, 0), "malformed"),
        (Offer(KEY, a_request((1,), name="another"), (), 1, 0), "malformed"),
        (offer(tuple(range(102))), "never_fits"),
    ],
)
def test_an_offer_that_cannot_be_is_denied_at_once(wrong: Offer, reason: str) -> None:
    end, _ = an_intake()
    assert said(end.receive(wrong, now=0)) == [Deny(KEY, reason)]


LONG = tuple(range(2 * HASHED_AT_ONCE + 3))


def test_a_long_offer_is_checked_a_piece_at_a_time_before_it_gets_room() -> None:
    end, pool = an_intake(limit=len(LONG))
    assert end.receive(offer(LONG), now=0) == [ContinueCheck()]
    assert end.room_changed(0) == []
    assert end.tick(0) == []
    assert end.continue_check(0) == [ContinueCheck()]
    assert pool.taken == 0
    (grant,) = said(end.continue_check(0))
    assert isinstance(grant, Grant)
    assert end.continue_check(0) == []


@pytest.mark.parametrize("block", [0, HASHED_AT_ONCE // FINGERPRINT.block_size, -1])
def test_a_long_offer_with_one_wrong_hash_gets_no_room(block: int) -> None:
    end, pool = an_intake(limit=len(LONG))
    hashes = list(offer(LONG).block_hashes)
    hashes[block] = ROOT
    effects = end.receive(dataclasses.replace(offer(LONG), block_hashes=tuple(hashes)), now=0)
    while effects == [ContinueCheck()]:
        effects = end.continue_check(0)
    assert said(effects) == [Deny(KEY, "malformed")]
    assert pool.taken == 0


@pytest.mark.parametrize("end_of_it", ["abort", "link lost", "drain"])
def test_a_long_offer_that_ends_while_it_is_checked_is_checked_no_further(end_of_it: str) -> None:
    end, pool = an_intake(limit=len(LONG))
    assert end.receive(offer(LONG), now=0) == [ContinueCheck()]
    if end_of_it == "abort":
        assert said(end.receive(Abort(KEY, "gone"), now=0)) == [Release(KEY)]
    elif end_of_it == "drain":
        assert said(end.drain(0)) == [Deny(KEY, "draining")]
    else:
        end.link_lost("l", now=0)
    assert end.continue_check(0) == []
    assert pool.taken == 0
    assert end.states() == {}


def test_a_short_offer_does_not_wait_for_the_check_of_a_long_one_that_is_behind_it() -> None:
    end, _ = an_intake(limit=len(LONG))
    end.receive(offer(LONG), now=0)
    older = dataclasses.replace(offer(request="older"), waited_ms=1000)
    (grant,) = said(end.receive(older, now=0))
    assert isinstance(grant, Grant)
    assert grant.key.request == "older"


def test_the_oldest_request_is_granted_first_whatever_order_offers_arrive_in() -> None:
    end, pool = an_intake(room=False)
    for name, waited in (("young", 10), ("old", 5000), ("middle", 900)):
        message = dataclasses.replace(offer(request=name), waited_ms=waited)
        assert said(end.receive(message, now=0)) == []
    pool.room = True
    granted = [message.key.request for message in said(end.room_changed(1))]
    assert granted == ["old", "middle", "young"]


def test_a_link_may_have_no_more_offers_than_its_credits() -> None:
    end, _ = an_intake()
    for name in "abc":
        end.receive(offer(request=name), now=0)
    assert said(end.receive(offer(request="d"), now=0))[0].reason == "overloaded"


def test_an_abort_is_answered_only_when_the_running_copy_has_ended() -> None:
    end, pool = an_intake()
    end.receive(offer(), now=0)
    (copy,) = [e for e in end.receive(blocks(0), now=1) if isinstance(e, Copy)]
    assert said(end.receive(Abort(KEY, "cancelled"), now=2)) == []
    assert pool.taken == 1
    assert said(end.copied(copy.number, "", now=3)) == [Release(KEY)]
    assert pool.taken == 0


def test_draining_denies_new_offers_and_lets_granted_ones_go_on() -> None:
    end, _ = an_intake()
    end.receive(offer(), now=0)
    end.drain(1)
    assert said(end.receive(offer(request="s"), now=2))[0].reason == "draining"
    assert any(isinstance(e, Copy) for e in end.receive(blocks(0), now=3))


def test_offers_beyond_the_credits_wait_at_the_sender_and_follow_as_credits_return() -> None:
    end = Handoff(Leases(Endless()), SETTINGS)
    end.open_link("l", 1)
    assert said(end.offer(offer(request="a"), now=0))
    assert not said(end.offer(offer(request="young"), now=0))
    assert not said(end.offer(offer(request="old"), now=0, waited=9.0))
    effects = end.receive(Deny(HandoffKey("l", "a", 1, 0), "out_of_blocks"), now=1)
    assert isinstance(effects[0], Ended)
    assert [message.key.request for message in said(effects)] == ["old"]


def test_silence_repeats_an_offer_and_then_tears_the_link_down_once() -> None:
    end = Handoff(Leases(Endless()), SETTINGS)
    end.open_link("l", 1)
    first = said(end.offer(offer(), now=0))
    kinds: list[str] = []
    for now in range(1, 40):
        effects = end.tick(float(now))
        assert set(said(effects)) <= set(first)
        kinds += [type(e).__name__ for e in effects if not isinstance(e, Send)]
    assert kinds == ["Teardown"]


def test_what_is_ready_before_the_grant_is_announced_with_it() -> None:
    end = Handoff(Leases(Endless()), SETTINGS)
    end.open_link("l", 1)
    end.offer(offer(), now=0)
    assert not said(end.ready(KEY, [ReadyBlock(0, 5, 2, bytes(16))], now=1))
    assert said(end.receive(Grant(KEY, (0, 1)), now=2)) == [blocks(0)]
    (tail,) = said(end.ready(KEY, [ReadyBlock(1, 6, 4, bytes(16))], now=3))
    assert isinstance(tail, Tail)
    assert (tail.index, tail.fill, tail.token_ids, tail.slot) == (1, 1, (3,), 6)


def test_a_grant_that_nobody_waits_for_is_answered_with_abort() -> None:
    end = Handoff(Leases(Endless()), SETTINGS)
    end.open_link("l", 1)
    assert said(end.receive(Grant(KEY, (0,)), now=0)) == [Abort(KEY, "unknown")]
    assert said(end.receive(Ack(KEY), now=0)) == []


EXAMPLES: list[Message] = [
    offer(),
    Grant(KEY, (0, 1)),
    Deny(KEY, "x"),
    blocks(0, 1),
    Tail(KEY, 1, b"p", (3,), 1, 5, 2, b""),
    Commit(KEY, 3, 9, None, 2),
    Ack(KEY),
    Abort(KEY, "x"),
    Release(KEY),
    Pull("l", b"t", 0, (1, 2), (2, 2), 0),
    Slabs("l", 0, ""),
    Proved("l", 0, True),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_transfer_messages_survive_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.sampled_from(EXAMPLES), st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_another_message_or_a_typed_error(message: Message, where: int, value: int) -> None:
    data = bytearray(encode(message))
    data[where % len(data)] = value
    try:
        changed = decode(data)
    except MalformedMessage:
        return
    end, _ = an_intake()
    if isinstance(changed, (Offer, Blocks, Tail, Commit, Abort)):
        end.receive(changed, now=0)  # whatever it says, it is answered, not raised
