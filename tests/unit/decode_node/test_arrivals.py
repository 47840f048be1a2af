"""A decode node that granted room and then got other work: what was granted has its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.engine import SamplingParams
from common.errors import NeverFits
from common.kv_layout import root_hash
from common.node.kv import NodeKV
from common.node.token_stream import ChoiceKey
from common.store.queue import Entry
from common.wire.message import HandoffKey
from common.wire.messages import Commit, Failed, Offer, TookOver
from decode_node.role import DecodeRole
from kv_transfer.pool_memory import HostPoolMemory
from kv_transfer.ports import Adopted, Reservation
from tests.support.asked import a_request
from tests.support.engines import poisoned_engine
from tests.support.hashes import chain_hashes
from tests.support.redis import a_dispatch
from tests.support.scripted_node import ScriptedNode

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
LONG = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=3)
PROMPT = tuple(range(20))


def a_node(slots: int) -> ScriptedNode:
    node = ScriptedNode(poisoned_engine(max_num_seqs=slots))
    engine = node.engine
    memory = HostPoolMemory(engine.pool.num_blocks, engine.layout.slab_bytes, warm=False)
    node.kv = NodeKV(engine, memory, digests=False)  # no block is sent from here
    node.run_role(DecodeRole(node))
    return node


@pytest.fixture
def small() -> Iterator[ScriptedNode]:
    """A node that runs one sequence at a time."""
    node = a_node(slots=1)
    yield node
    node.engine.check_idle()


def an_offer(
    node: ScriptedNode, request: str = "moved", ask: int = 1, params: SamplingParams = PARAMS
) -> Offer:
    size = node.engine.layout.block_size
    hashes = chain_hashes(root_hash(node.engine.fingerprint, ""), PROMPT, size, len(PROMPT))
    asked = a_request(PROMPT, params, request, gateway="gateway-1")
    key = HandoffKey("link", request, 1, 0, ask)
    return Offer(key, asked, tuple(hashes), len(PROMPT) % size, 0)


def arrives(node: ScriptedNode, offer: Offer, reservation: Reservation) -> None:
    """Its Ack is said; the KV is garbage here, which nobody looks at."""
    key = offer.key
    commit = Commit(key, len(PROMPT), 7, None, len(reservation.blocks))
    node.kv.adopt(reservation)
    node.role.arrived(Adopted(key, offer, commit, reservation, 0.0))


async def test_a_prompt_that_was_granted_room_is_taken_whatever_came_meanwhile(small: ScriptedNode) -> None:
    offer = an_offer(small)
    reservation = small.kv.reserve(offer)
    assert reservation is not None
    entry = Entry("1-0", a_dispatch("queued", params=PARAMS))
    small.role.accept(entry)
    assert small.engine.plan() is None, "the only slot is promised"
    arrives(small, offer, reservation)
    assert small.said == [TookOver("self", "moved", 1, 0, len(PROMPT) + 1)]
    small.role.cancel("gateway-1", "moved", 1, "")
    while small.engine.has_work:
        await small.step(small.role)
    assert len({run.request for run in small.runs}) == 1, "the other one ran afterwards"


async def test_a_second_adoption_of_the_same_choice_gives_its_room_back() -> None:
    """Its Ack was lost, and it was offered again."""
    node = a_node(slots=2)
    for ask in (1, 2):
        offer = an_offer(node, ask=ask)
        reservation = node.kv.reserve(offer)
        assert reservation is not None
        arrives(node, offer, reservation)
    assert [type(message) for message in node.said] == [TookOver, TookOver]
    assert node.engine.scheduler.num_free_slots == 1
    node.role.cancel("another", "moved", 9, "not its own")
    assert node.engine.scheduler.num_free_slots == 1
    node.role.cancel("gateway-1", "moved", 1, "")
    node.engine.check_idle()


async def test_what_cannot_run_after_its_arrival_gives_its_room_back(small: ScriptedNode) -> None:
    offer = an_offer(small, params=SamplingParams(max_tokens=1))  # which its first token uses up
    reservation = small.kv.reserve(offer)
    assert reservation is not None
    arrives(small, offer, reservation)
    (failed,) = small.said
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_request"


@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=100_000), SamplingParams(stop_token_ids=(10**6,))]
)
def test_a_prompt_that_could_not_run_here_gets_no_room(small: ScriptedNode, params: SamplingParams) -> None:
    with pytest.raises(NeverFits):
        small.kv.reserve(an_offer(small, params=params))


def test_an_offer_that_is_withdrawn_leaves_the_line(small: ScriptedNode) -> None:
    (running,) = small.engine.add_prompt("running", PROMPT, PARAMS)
    small.engine.step()
    waiting = an_offer(small)
    assert small.kv.reserve(waiting) is None
    (behind,) = small.engine.add_prompt("behind", PROMPT[:3], PARAMS)
    small.engine.abort("running")
    assert small.engine.step() == [], "the offer goes first"
    small.kv.withdraw(an_offer(small, "another"))
    assert small.engine.step() == []
    small.kv.withdraw(waiting)
    assert [output.request_id for output in small.engine.step()] == ["behind"]
    assert running.finish_reason is not None
    small.engine.abort(behind.request_id)


def test_the_first_of_the_offers_keeps_their_place_in_line(small: ScriptedNode) -> None:
    """Whoever of them that is: a more important one that comes later does not begin at the end."""
    small.engine.add_prompt("running", PROMPT, PARAMS)
    small.engine.step()
    assert small.kv.reserve(an_offer(small, "first")) is None
    small.engine.add_prompt("behind", PROMPT[:3], PARAMS)
    small.engine.abort("running")
    reservation = small.kv.reserve(an_offer(small, "older"))
    assert reservation is not None
    small.kv.discard(reservation)
    small.engine.abort("behind")


@pytest.mark.parametrize("stopped", [0, 1, 2])
@pytest.mark.parametrize("in_step", [False, True])
async def test_a_choice_that_is_cancelled_ends_at_once_and_its_siblings_go_on(
    stopped: int, in_step: bool
) -> None:
    node = a_node(slots=4)
    role = node.role
    entry = Entry("1-0", a_dispatch("r", 1, (0, 1, 2), prompt=20, params=LONG))
    role.accept(entry)
    await node.step(role)
    assert node.engine.scheduler.num_running == 3
    step = await node.begin_step(role) if in_step else None
    role.cancel("gateway-1", "r", 1, "stopped", frozenset({stopped}))
    if step is not None:
        node.end_step(role, step)
    assert node.engine.scheduler.num_running == 2
    assert role.holds(ChoiceKey("r", 1, (stopped + 1) % 3))
    assert not role.holds(ChoiceKey("r", 1, stopped))
    node.runs.clear()
    while node.engine.has_work:
        await node.step(role)
    assert {run.choice for run in node.runs} == {0, 1, 2} - {stopped}
    assert role.num_open == 0
    assert node.deleted == [entry]
    node.engine.check_idle()


async def test_choices_that_wait_for_a_prompt_are_not_cancelled_with_the_one_that_computes_it() -> None:
    """The gateway, which gets no token of it before that, does not ask for it; if it did, it would
    say so again."""
    node = a_node(slots=4)
    role = node.role
    role.accept(Entry("1-0", a_dispatch("r", 1, (0, 1), prompt=20, params=LONG)))
    role.cancel("gateway-1", "r", 1, "stopped", frozenset({0}))
    role.cancel("gateway-1", "r", 1, "stopped", frozenset({1}))
    while node.engine.has_work:
        await node.step(role)
    assert {run.choice for run in node.runs} == {0, 1}
    role.accept(Entry("2-0", a_dispatch("s", 1, (0, 1), params=LONG)))
    role.cancel("gateway-1", "s", 1, "closed")
    assert not node.engine.has_work
    node.engine.check_idle()
