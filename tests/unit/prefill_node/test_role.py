"""The prefill role against a scripted transfer layer: what it does when the other end fails it."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

import common.engine.core.sequence
from common.errors import LinkLost
from common.kv_layout import root_hash
from common.sampling import SamplingParams
from common.store.queue import Entry
from common.wire.message import HandoffKey
from common.wire.messages import Failed, TookOver
from kv_transfer.ports import Ended, Outcome
from prefill_node import role as prefill
from tests.support.checkpoints import DRAFT
from tests.support.engines import poisoned_engine
from tests.support.hashes import chain_hashes
from tests.support.redis import a_dispatch
from tests.support.scripted_node import ScriptedNode, ended, key


@pytest.fixture
def role(node: ScriptedNode) -> prefill.PrefillRole:
    role = prefill.PrefillRole(node)
    node.run_role(role)
    return role


def an_entry() -> Entry:
    return Entry("1-0", a_dispatch(prompt=20))


async def test_it_says_who_took_over_for_that_node_may_be_dead_already(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    await node.step(role)
    assert node.links.committed == [key("d1")]
    node.links.tell(ended("d1", Outcome.ADOPTED))
    assert node.said == [TookOver("d1", "r-1", 1, 0, 21)]
    assert role.num_open == 0


async def test_what_is_queued_again_while_or_after_it_is_here_is_computed_once(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    again = an_entry()
    role.accept(again)
    assert node.deleted == [again]
    await node.step(role)
    node.links.tell(ended("d1", Outcome.ADOPTED))
    role.accept(again)
    assert not node.engine.has_work
    assert len(node.links.offers) == 1


async def test_a_prompt_whose_blocks_are_named_already_is_not_hashed_again(
    node: ScriptedNode, role: prefill.PrefillRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would hash all of it at once, while everybody's next step waits."""
    node.decode_nodes("d1")
    entry, mine = an_entry(), node.engine.fingerprint
    hashes = chain_hashes(root_hash(mine), entry.dispatch.request.token_ids, mine.block_size, 20)
    monkeypatch.setattr(common.engine.core.sequence, "block_hash", None)
    role.accept(dataclasses.replace(entry, block_hashes=tuple(hashes)))
    await node.step(role)
    (offer,) = node.links.offers
    assert offer.block_hashes == tuple(hashes)
    assert len(hashes) == 20 // mine.block_size > 0
    node.links.tell(ended("d1", Outcome.ADOPTED))


async def test_the_last_blocks_are_announced_before_the_first_token_is_there(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    step = await node.begin_step(role)
    blocks = node.engine.pool.blocks_for(20)
    assert 20 % node.engine.layout.block_size, "the prompt has a tail"

    computed = node.engine.runner.run(step.input, lambda _: role.step_filled(role.handed_off(step)))
    assert node.links.announced == list(range(blocks))
    assert node.links.committed == []
    role.step_ended(step, node.engine.commit(step, computed))
    assert node.links.announced == list(range(blocks)), "no block is announced twice"
    assert node.links.committed == [key("d1")]
    node.links.tell(ended("d1", Outcome.ADOPTED))


@pytest.mark.parametrize("broken", [False, True])
async def test_blocks_of_a_step_that_is_not_finite_are_sealed_and_announced_to_nobody(
    node: ScriptedNode, role: prefill.PrefillRole, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node would find them in its cache."""
    node.decode_nodes("d1")
    role.accept(an_entry())
    step = node.engine.plan()
    assert step is not None
    role.step_begins(step)
    await node.opened()
    before = list(node.links.announced)
    if broken:
        embedding = node.engine.runner.model._embedding.clone()
        embedding[17] = float("nan")
        monkeypatch.setattr(node.engine.runner.model, "_embedding", embedding)
    filled = node.steps._when_filled(step)
    computed = await asyncio.to_thread(node.engine.runner.run, step.input, filled)
    await asyncio.sleep(0)
    announced = node.links.announced[len(before) :]
    assert (not node.sealed, not announced) == (broken, broken)
    role.step_ended(step, node.engine.commit(step, computed))
    if broken:
        assert node.links.announced == before
        assert node.links.cancelled == [key("d1")]
        (failed,) = node.said
        assert isinstance(failed, Failed)
        assert (failed.code, failed.retryable) == ("no_token", False)
    node.links.tell(ended("d1", Outcome.CANCELLED if broken else Outcome.ADOPTED))
    assert role.num_open == 0


async def test_nobody_but_its_gateway_cancels_a_request(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    for gateway in ("another", "", "d1"):
        role.cancel(gateway, "r-1", 9, "not its own")
        assert node.engine.has_work
        assert not node.links.cancelled
    role.cancel("gateway-1", "r-1", 1, "its own")
    assert not node.engine.has_work
    assert role.num_open == 0


async def test_of_a_request_that_is_cancelled_meanwhile_nothing_more_is_announced(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    step = await node.begin_step(role)
    chunks = role.handed_off(step)
    announced = list(node.links.announced)  # what the prefix cache had
    role.cancel("gateway-1", "r-1", 1, "the client went away")
    role.step_filled(chunks)
    assert node.links.announced == announced
    node.end_step(role, step)
    node.links.tell(ended("d1", Outcome.CANCELLED))
    assert role.num_open == 0


async def test_a_link_that_is_found_down_by_sending_over_it_is_no_crash(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1", "d2")
    role.accept(an_entry())
    step = await node.begin_step(role)
    (first,) = node.links.offers
    node.links.ended = [Ended(HandoffKey(first.key.link, "r-1", 1, 0), True, Outcome.LINK_LOST, "link_lost")]
    node.end_step(role, step)
    await node.opened()
    assert {offer.key.link for offer in node.links.offers} == {"link-d1", "link-d2"}
    (committed,) = node.links.committed
    assert committed.link != first.key.link
    node.links.tell(Ended(committed, True, Outcome.ADOPTED, ""))


async def test_where_all_are_full_the_gateway_hears_at_once_that_there_is_no_room(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    await node.step(role)
    node.links.tell(ended("d1", Outcome.DENIED, "out_of_blocks"))
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("out_of_blocks", True)
    assert role.num_open == 0


async def test_a_prompt_without_a_decode_node_waits_for_one(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    node.links.unreachable = {"d1": LinkLost}
    role.accept(an_entry())
    await node.step(role)
    assert node.links.offers == []
    node.decode_nodes("d1", "d2")
    role.peers_changed()
    await node.opened()
    role.peers_changed()
    assert node.links.committed == [key("d2")]
    node.links.tell(ended("d2", Outcome.ADOPTED))


@pytest.mark.parametrize("error", [OSError, RuntimeError, MemoryError, KeyError, asyncio.CancelledError])
@pytest.mark.parametrize("where", ["link", "seal"])
async def test_whatever_goes_wrong_while_a_link_opens_another_node_is_asked(
    where: str,
    error: type[BaseException],
    node: ScriptedNode,
    role: prefill.PrefillRole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of it stays open: `node` looks whether a block is left."""
    node.decode_nodes("d1")
    role.accept(an_entry())
    with monkeypatch.context() as patch:
        if where == "link":
            node.links.unreachable = {"d1": error}
        else:

            def unsealed(*_: object) -> None:
                raise error("no digest")

            patch.setattr(node, "unsealed", unsealed)
        await node.step(role)
    assert node.links.offers == []
    node.links.unreachable = {}
    role.peers_changed()
    await node.opened()
    assert node.links.committed == [key("d1")]
    node.links.tell(ended("d1", Outcome.ADOPTED))
    assert role.num_open == 0


async def test_an_attempt_that_is_cancelled_while_a_link_fails_to_open_ends(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    node.links.unreachable = {"d1": RuntimeError}
    role.accept(an_entry())
    step = node.engine.plan()
    assert step is not None
    role.step_begins(step)
    role.cancel("gateway-1", "r-1", 1, "closed")
    await node.opened()
    assert role.num_open == 0
    node.end_step(role, step)


async def test_a_node_that_failed_it_is_asked_again_when_there_is_no_other(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    """As another handoff: of the first one it would only say again how that ended."""
    node.decode_nodes("d1")
    role.accept(an_entry())
    await node.step(role)
    node.links.tell(ended("d1", Outcome.FAILED, "internal_error"))
    role.peers_changed()
    await node.opened()
    assert node.links.committed == [key("d1"), key("d1", ask=2)]
    assert node.said == []
    node.links.tell(ended("d1", Outcome.ADOPTED, ask=2))
    assert role.num_open == 0


@pytest.mark.parametrize("reason", ["digest_mismatch", "stale_block", "malformed_message"])
async def test_blocks_that_fail_their_proof_are_offered_to_nobody_else_and_are_no_prefix(
    node: ScriptedNode, role: prefill.PrefillRole, reason: str
) -> None:
    """Damaged in this node's memory, they would fail at every node, and for every prompt like it."""
    node.decode_nodes("d1", "d2")
    role.accept(an_entry())
    await node.step(role)
    cached = node.engine.pool.snapshot().block_hashes
    node.links.tell(ended("d1", Outcome.FAILED, reason))
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("transfer_error", True)
    assert node.links.committed == [key("d1")]
    assert role.num_open == 0
    assert cached
    assert not cached & node.engine.pool.snapshot().block_hashes


async def test_a_node_that_is_known_to_be_lost_is_not_asked_again_for_every_prompt(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1", "d2")
    node.peers.waited_in_vain("d1")
    entry = an_entry()
    chosen = dataclasses.replace(entry.dispatch, decode_node="d1", decode_endpoint="tcp://d1:1")
    role.accept(dataclasses.replace(entry, dispatch=chosen))
    await node.step(role)
    assert node.links.committed == [key("d2")]
    node.links.tell(ended("d2", Outcome.ADOPTED))


async def test_it_does_not_wait_for_long(node: ScriptedNode, role: prefill.PrefillRole) -> None:
    role.accept(an_entry())
    await node.step(role)
    role.peers_changed()
    assert node.said == []
    role.no_decode_node_s = 0.0
    role.peers_changed()
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("service_unavailable", True)
    assert role.num_open == 0


async def test_a_choice_that_is_cancelled_makes_way_for_the_next(
    node: ScriptedNode, role: prefill.PrefillRole
) -> None:
    """A stop string was met in what a former attempt delivered, or in its first token."""
    node.decode_nodes("d1")
    role.accept(Entry("1-0", a_dispatch(choices=(0, 1, 2), prompt=20)))
    await node.step(role)
    assert node.links.committed == [key("d1", 0)]
    role.cancel("gateway-1", "r-1", 1, "stopped", frozenset({1}))
    role.cancel("gateway-1", "r-1", 1, "stopped", frozenset({0}))
    assert node.links.cancelled == [key("d1", 0)]
    await node.opened()
    node.links.tell(ended("d1", Outcome.CANCELLED, choice=0))
    assert node.links.committed == [key("d1", 0), key("d1", 2)]
    node.links.tell(ended("d1", Outcome.ADOPTED, choice=2))
    assert role.num_open == 0


@pytest.mark.parametrize("cached", ["", "by the model", "by both"])
async def test_blocks_that_are_sent_before_the_draft_model_made_up_for_them_do_not_count_as_drafted(
    cached: str,
) -> None:
    """A cached block is sent at once, and the draft model computes it in the first step: too late."""
    node = ScriptedNode(poisoned_engine(speculative="draft", speculative_model=str(DRAFT)))
    role = prefill.PrefillRole(node)
    node.run_role(role)
    node.decode_nodes("d1")
    entry, params = an_entry(), SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = entry.dispatch.request.token_ids
    if cached:
        (sequence,) = node.engine.add_prompt("before", prompt, params)
        sequence.draft_model_follows = cached == "by both"
    while node.engine.has_work:
        node.engine.step()
    role.accept(entry)
    await node.step(role)
    assert bool(node.engine.pool.num_hit_blocks) == bool(cached)
    assert node.links.draft_positions == [0 if cached == "by the model" else len(prompt)]
    node.links.tell(ended("d1", Outcome.ADOPTED))
    node.engine.check_idle()


async def test_a_resumed_reply_does_not_end_here_because_drafts_were_right() -> None:
    """One token was delivered, so that the next step decodes; a draft would make the last of two."""
    node = ScriptedNode(poisoned_engine(speculative="ngram"))
    role = prefill.PrefillRole(node)
    node.run_role(role)
    node.decode_nodes("d1")
    params = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.0, logit_bias=((20, 100.0),))
    entry = Entry("1-0", a_dispatch(token_ids=(20,) * 21, prompt_len=20, params=params))
    role.accept(entry)
    while not node.runs:
        await node.step(role)
    (run,) = node.runs
    assert (run.token_ids, run.finish_reason) == ((20,), "")
    node.links.tell(ended("d1", Outcome.ADOPTED))
    node.engine.check_idle()
