"""A draining decode node against a scripted transfer layer: what is offered, and what goes on here."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from common.engine import Engine, SamplingParams
from common.errors import LinkLost
from common.node.kv import NodeKV
from common.settings.config import EngineSettings
from common.store.queue import Entry
from common.wire.messages import Failed, TookOver
from decode_node import moves
from decode_node.role import DecodeRole
from kv_transfer.pool_memory import HostPoolMemory
from kv_transfer.ports import Granted, Outcome
from tests.support.checkpoints import STORIES
from tests.support.engines import with_poison
from tests.support.redis import a_dispatch
from tests.support.scripted_node import ScriptedNode, ended, key

PROMPT = 20
Ranges = Sequence[tuple[int, int]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=3)


@pytest.fixture
def role(node: ScriptedNode) -> DecodeRole:
    role = DecodeRole(node)
    node.run_role(role)
    return role


def an_entry(request: str = "r-1", choices: tuple[int, ...] = (0,)) -> Entry:
    return Entry("1-0", a_dispatch(request, 1, choices, prompt=PROMPT, params=PARAMS))


def truth(engine: Engine) -> tuple[int, ...]:
    (completion,) = engine.generate([list(range(PROMPT))], PARAMS)
    return completion.token_ids


async def drained(node: ScriptedNode, role: DecodeRole, *peers: str, steps: int = 3) -> None:
    """One request that has so many tokens when the node is told to end."""
    node.decode_nodes(*peers)
    role.accept(an_entry())
    for _ in range(steps):
        await node.step(role)
    role.drain()
    await node.opened()


async def run_out(node: ScriptedNode, role: DecodeRole) -> None:
    while node.engine.has_work:
        await node.step(role)


def tokens(node: ScriptedNode) -> tuple[int, ...]:
    return tuple(token for run in node.runs for token in run.token_ids)


async def test_it_offers_what_it_has_and_commits_the_last_token(node: ScriptedNode, role: DecodeRole) -> None:
    expected = truth(node.engine)
    await drained(node, role, "d1")
    (offer,) = node.links.offers
    assert offer.request.token_ids == (*range(PROMPT), *expected[:2])
    assert (offer.request.prompt_len, offer.request.params, offer.tail_fill) == (PROMPT, PARAMS, 6)
    assert node.links.next_tokens == [(PROMPT + 2, expected[2])]
    assert not node.engine.has_work, "it has paused"
    node.links.tell(Granted(key("d1"), (0, 1)))
    node.links.tell(ended("d1", Outcome.ADOPTED))
    assert node.said == [TookOver("d1", "r-1", 1, 0, PROMPT + 3)]
    assert tokens(node) == expected[:3]
    assert role.num_open == 0
    assert len(node.deleted) == 1


async def test_a_step_that_runs_is_waited_for(node: ScriptedNode, role: DecodeRole) -> None:
    expected = truth(node.engine)
    node.decode_nodes("d1")
    role.accept(an_entry())
    await node.step(role)
    step = await node.begin_step(role)
    role.drain()
    await node.opened()
    assert node.links.offers == []
    node.end_step(role, step)
    assert node.links.next_tokens == [(PROMPT + 1, expected[1])]
    node.links.tell(ended("d1", Outcome.ADOPTED))


@pytest.mark.parametrize("outcome", [Outcome.DENIED, Outcome.FAILED, Outcome.LINK_LOST])
async def test_what_nobody_takes_goes_on_here_as_if_nothing_had_been(
    node: ScriptedNode, role: DecodeRole, outcome: Outcome
) -> None:
    expected = truth(node.engine)
    await drained(node, role, "d1", "d2")
    for asked in range(2):
        offer = node.links.offers[asked]
        peer = offer.key.link.removeprefix("link-")
        node.links.tell(ended(peer, outcome, "draining", ask=1 + asked))
        await node.opened()
    assert {offer.key.link for offer in node.links.offers} == {"link-d1", "link-d2"}
    assert role.num_open == 1
    await run_out(node, role)
    role.peers_changed()
    assert len(node.links.offers) == 2, "each node is asked once"
    assert tokens(node) == expected
    assert node.said == []
    assert role.num_open == 0


async def test_one_whose_blocks_fail_their_proof_does_not_go_on_here_either(
    node: ScriptedNode, role: DecodeRole
) -> None:
    """Whatever it makes from now on may be wrong; another attempt computes it again."""
    await drained(node, role, "d1", "d2")
    (offer,) = node.links.offers
    node.links.tell(ended(offer.key.link.removeprefix("link-"), Outcome.FAILED, "digest_mismatch"))
    await node.opened()
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("transfer_error", True)
    assert len(node.links.offers) == 1
    assert role.num_open == 0
    assert not node.engine.has_work


async def test_a_node_that_cannot_be_reached_costs_no_pause(node: ScriptedNode, role: DecodeRole) -> None:
    expected = truth(node.engine)
    node.links.unreachable = {"d1": LinkLost, "d2": LinkLost}
    await drained(node, role, "d1", "d2")
    assert node.links.offers == []
    assert node.engine.scheduler.num_paused == 0
    await run_out(node, role)
    assert tokens(node) == expected


class Sealing(HostPoolMemory):
    """Notes which blocks get a digest, in which thread, and how full they are."""

    def __init__(self, num_blocks: int, slab_bytes: int) -> None:
        super().__init__(num_blocks, slab_bytes, warm=False)
        self.sealed: list[tuple[int, str, bool]] = []
        self.may_seal = threading.Event()
        self.may_seal.set()

    def seal(self, block: int, seed: bytes = b"", ranges: Ranges = ()) -> int:
        here = threading.current_thread()
        on_loop = here is threading.main_thread()
        assert on_loop or self.may_seal.wait(10)
        self.sealed.append((block, "loop" if on_loop else "thread", bool(ranges)))
        return super().seal(block, seed, ranges)


@pytest.fixture
def sealing() -> Iterator[tuple[ScriptedNode, Sealing]]:
    """A node whose blocks lie in memory that others may read."""
    settings = EngineSettings(
        model=str(STORIES), dtype="float32", threads=1, num_kv_blocks=64, max_num_seqs=8, block_size=4
    )
    memories: list[Sealing] = []

    def storage(device: torch.device, num_blocks: int, slab_bytes: int) -> torch.Tensor:
        memories.append(Sealing(num_blocks, slab_bytes))
        return memories[0].slabs

    def freed(blocks: Sequence[int]) -> None:
        for block in blocks:
            memories[0].begin_write(block)

    engine = with_poison(settings, storage=storage, on_free=freed)
    (memory,) = memories
    node = ScriptedNode(engine)
    node.kv = NodeKV(engine, memory, digests=True)
    yield node, memory
    engine.check_idle()


async def test_digests_of_what_moves_do_not_hold_up_the_streams_of_others(
    sealing: tuple[ScriptedNode, Sealing],
) -> None:
    """But for the tail's, which can be sealed only when the sequence stands still."""
    node, memory = sealing
    role = DecodeRole(node)
    node.run_role(role)
    await drained(node, role, "d1")
    blocks = [announced.slot for announced in node.links.announced]
    assert len(blocks) == -(-(PROMPT + 2) // 4)
    assert memory.sealed == [*((block, "thread", False) for block in blocks[:-1]), (blocks[-1], "loop", True)]
    node.links.tell(Granted(key("d1"), tuple(range(len(blocks)))))
    node.links.tell(ended("d1", Outcome.ADOPTED))


@pytest.mark.parametrize("ends", ["cancelled", "finished"])
async def test_blocks_that_are_being_sealed_stay_where_they_are(
    sealing: tuple[ScriptedNode, Sealing], ends: str
) -> None:
    node, memory = sealing
    role = DecodeRole(node)
    node.run_role(role)
    node.decode_nodes("d1")
    role.accept(an_entry())
    for _ in range(3):
        await node.step(role)
    memory.may_seal.clear()
    role.drain()
    await asyncio.sleep(0.01)
    (sequence,) = node.engine.scheduler.running
    blocks = sequence.block_table[: sequence.num_computed // 4]
    if ends == "cancelled":
        role.cancel("gateway-1", "r-1", 1, "client went away")
    else:
        while node.engine.has_work:  # it runs meanwhile
            step = node.engine.plan()
            assert step is not None
            role.step_ended(step, node.engine.commit(step, node.engine.runner.run(step.input)))
    assert all(node.engine.pool.references(block) == 1 for block in blocks)
    memory.may_seal.set()
    await node.opened()
    assert node.links.offers == []
    assert node.engine.pool.num_used == 0
    assert role.num_open == 0


async def test_without_a_grant_in_time_it_goes_on_before_the_offer_is_answered(
    node: ScriptedNode, role: DecodeRole
) -> None:
    expected = truth(node.engine)
    role._moves.grant_s = 0.0
    await drained(node, role, "d1", "d2")
    await asyncio.sleep(0.001)  # the timer
    (offer,) = node.links.offers
    assert [cancelled.link for cancelled in node.links.cancelled] == [offer.key.link]
    await node.step(role)
    assert len(node.links.offers) == 1, "one conversation at a time"
    role._moves.grant_s = 60.0
    node.links.tell(ended(offer.key.link.removeprefix("link-"), Outcome.CANCELLED))
    await node.opened()
    assert len(node.links.offers) == 2, "of the other node"
    other = node.links.offers[1].key.link.removeprefix("link-")
    assert node.links.next_tokens[1] == (PROMPT + 3, expected[3])
    node.links.tell(Granted(key(other, ask=2), ()))
    node.links.tell(ended(other, Outcome.ADOPTED, ask=2))
    assert node.said == [TookOver(other, "r-1", 1, 0, PROMPT + 4)]
    assert tokens(node) == expected[:4]


async def test_nodes_without_room_by_their_records_are_not_asked(
    node: ScriptedNode, role: DecodeRole
) -> None:
    node.decode_nodes("d1", free_blocks=1)
    role.accept(an_entry())
    await node.step(role)
    role.drain()
    for room in ({"running": 8}, {"free_blocks": 2, "running": 1}, {"model": "another"}):
        node.decode_nodes("d1", **room)
        role.peers_changed()
        await node.opened()
        assert node.links.offers == []
    node.decode_nodes("d1")
    role.peers_changed()
    await node.opened()
    assert len(node.links.offers) == 1
    node.links.tell(ended("d1", Outcome.ADOPTED))


async def test_one_that_was_full_is_asked_for_all_again_when_its_record_is_read_again(
    node: ScriptedNode, role: DecodeRole
) -> None:
    node.decode_nodes("d1")
    for request in ("r-1", "r-2"):
        role.accept(an_entry(request))
    node.engine.scheduler.max_num_seqs, room = 1, node.engine.scheduler.max_num_seqs
    await node.step(role)  # r-2 waits
    node.engine.scheduler.max_num_seqs = room
    role.drain()
    await node.opened()
    node.links.tell(ended("d1", Outcome.DENIED, "out_of_blocks"))
    await node.step(role)
    assert [offer.key.request for offer in node.links.offers] == ["r-1"]
    role.peers_changed()
    await node.opened()
    assert [offer.key.request for offer in node.links.offers] == ["r-1", "r-2", "r-1"]
    assert [offer.key.ask for offer in node.links.offers] == [1, 1, 2], "no old answer is about it"
    node.links.tell(dataclasses.replace(ended("d1", Outcome.ADOPTED), key=key("d1", 0, "r-2")))
    node.links.tell(ended("d1", Outcome.ADOPTED, ask=2))
    assert role.num_open == 0


async def test_a_cancel_in_the_middle_frees_everything_when_the_other_end_has_answered(
    node: ScriptedNode, role: DecodeRole
) -> None:
    await drained(node, role, "d1")
    role.cancel("gateway-1", "r-1", 1, "client went away")
    assert node.links.cancelled == [key("d1")]
    assert role.num_open == 1
    node.links.tell(ended("d1", Outcome.ADOPTED))  # the Ack crossed it; that node is told by the gateway
    assert role.num_open == 0
    assert node.said == []


async def test_choices_go_one_after_the_other_to_the_same_node(node: ScriptedNode, role: DecodeRole) -> None:
    node.decode_nodes("d1", "d2")
    role.accept(an_entry(choices=(0, 1)))
    for _ in range(2):
        await node.step(role)
    role.drain()
    await node.opened()
    (first,) = node.links.offers
    peer = first.key.link.removeprefix("link-")
    node.decode_nodes(*({"d1", "d2"} - {peer}), free_blocks=200)
    node.another_decode_node(peer, free_blocks=100)
    await node.step(role)
    assert len(node.links.offers) == 1
    node.links.tell(ended(peer, Outcome.ADOPTED, choice=first.key.choice))
    await node.opened()
    await node.step(role) if node.engine.has_work else None
    second = node.links.offers[1]
    assert {first.key.choice, second.key.choice} == {0, 1}
    assert second.key.link == first.key.link, "its prompt is there"
    node.links.tell(ended(peer, Outcome.ADOPTED, choice=second.key.choice))
    assert role.num_open == 0


async def test_a_few_move_at_a_time_and_the_others_decode_meanwhile(
    node: ScriptedNode, role: DecodeRole
) -> None:
    node.decode_nodes("d1")
    count = moves.AT_ONCE + 2
    for number in range(count):
        role.accept(an_entry(f"r-{number}"))
    await node.step(role)
    role.drain()
    await node.opened()
    assert len(node.links.offers) == moves.AT_ONCE
    assert node.engine.scheduler.num_running == 2
    while node.links.offers:
        offer = node.links.offers.pop(0)
        node.links.tell(
            dataclasses.replace(ended("d1", Outcome.ADOPTED), key=key("d1", 0, offer.key.request))
        )
        await node.opened()
    assert role.num_open == 0
