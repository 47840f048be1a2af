"""What two nodes count of a request that goes from one to the other, read over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re

import httpx
import pytest

from common.commands import inspect
from common.sampling import SamplingParams
from common.settings.config import EngineSettings, MetricsSettings
from common.store.client import RedisClient
from common.store.node_record import NodeRecord, Role
from common.store.registry import Registry
from tests.support.checkpoints import STORIES
from tests.support.dispatching import dispatch
from tests.support.metrics import scrape
from tests.support.redis import wait_until
from tests.support.running_nodes import running

BLOCKS, BLOCK = 64, 16
ENGINE = EngineSettings(
    model=str(STORIES),
    dtype="float32",
    threads=1,
    num_kv_blocks=BLOCKS,
    block_size=BLOCK,
    max_num_seqs=4,
    max_num_batched_tokens=256,
)
PROMPT = [7 + n for n in range(3 * BLOCK + 5)]
GENERATED = 6


async def test_a_handoff_is_counted_at_both_ends_by_transport_and_outcome(redis_client: RedisClient) -> None:
    async with running(redis_client, ENGINE, "prefill", "decode") as (prefill, decode):
        for name in ("r-1", "r-2"):
            params = SamplingParams(max_tokens=GENERATED, ignore_eos=True, temperature=0.0)
            answer = await dispatch(redis_client, name, PROMPT, params, prefill, decode)
            assert len(answer.token_ids) == GENERATED

        async def settled() -> bool:
            return (await scrape(prefill.url)).get("pdq_open_attempts") == 0

        await wait_until(settled, "the handoffs have ended")
        sender, receiver = await scrape(prefill.url), await scrape(decode.url)

    ended = {"transport": "shm", "outcome": "adopted"}
    assert sender.get("pdq_handoffs_total", end="handoff", **ended) == 2
    assert receiver.get("pdq_handoffs_total", end="intake", **ended) == 2
    assert sender.total("pdq_handoffs_total") == receiver.total("pdq_handoffs_total") == 2
    # Three full blocks once, and the tail each time: a quarter and a bit of a block.
    assert receiver.get("pdq_received_blocks_total", transport="shm") == 5
    slab = decode.slab_bytes
    tail = slab * (len(PROMPT) % BLOCK) // BLOCK
    assert receiver.get("pdq_received_bytes_total", transport="shm") == 3 * slab + 2 * tail
    assert sender.get("pdq_kv_links", end="handoff", transport="shm") == 1
    assert receiver.get("pdq_kv_links", end="intake", transport="shm") == 1

    assert sender["pdq_prompt_tokens_total"] == len(PROMPT) + len(PROMPT) % BLOCK
    assert sender["pdq_prefix_cache_hits_total"] == 3 * BLOCK
    assert sender["pdq_prefix_cache_queries_total"] >= 6 * BLOCK
    both = sender["pdq_generation_tokens_total"] + receiver["pdq_generation_tokens_total"]
    assert both == 2 * GENERATED

    for node in (sender, receiver):
        free = node.get("pdq_kv_blocks", state="free")
        assert free + node.get("pdq_kv_blocks", state="used") == BLOCKS
        assert node.get("pdq_kv_blocks", state="cached") >= 3
        assert node["pdq_kv_cache_usage_perc"] == node["pdq_kv_cache_unfilled_perc"] == 0
        assert node["pdq_num_requests_running"] == node["pdq_num_requests_waiting"] == 0
        steps = node.get("pdq_steps_total", outcome="computed")
        assert steps == node["pdq_step_seconds_count"] > 0
        assert node["pdq_step_seconds_sum"] > 0
        assert node.get("pdq_bus_events_total", event="sent") > 0
        assert node["pdq_suspects"] == node["pdq_spoiled_sequences_total"] == 0
        assert node["pdq_num_preemptions_total"] == 0


async def test_drafts_and_how_many_of_them_were_right_are_counted_by_place(redis_client: RedisClient) -> None:
    drafting = dataclasses.replace(ENGINE, speculative="ngram", num_speculative_tokens=3)
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0, logit_bias=((20, 30.0),))
    async with running(redis_client, drafting, "unified") as (node,):
        answer = await dispatch(redis_client, "r-1", PROMPT, params, node)
        assert tuple(answer.token_ids) == (20,) * 60, "so biased, it repeats one token"
        found = await scrape(node.url)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    drafts, drafted, accepted = (
        found.get(f"pdq_spec_decode_{name}_total", proposer="ngram") for name in names
    )
    assert 0 < drafts <= accepted <= drafted
    assert (answer.drafted, answer.accepted) == (drafted, accepted), "as the gateway hears it"
    by_place = [
        found.get("pdq_spec_decode_num_accepted_tokens_per_pos_total", proposer="ngram", position=str(place))
        for place in range(3)
    ]
    assert sum(by_place) == accepted
    assert by_place == sorted(by_place, reverse=True)
    assert found.total("pdq_spec_decode_saved_seconds") != 0
    assert found.get("pdq_steps_total", outcome="computed") < 60


async def test_pdq_nodes_shows_who_drafts_how_much_of_it_is_right_and_what_it_saves(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = redis_client.settings
    monkeypatch.setenv("PDQ_REDIS_URL", settings.url)
    monkeypatch.setenv("PDQ_REDIS_PREFIX", settings.prefix)

    async def shown(*flags: str) -> str:
        assert await asyncio.to_thread(inspect.nodes, flags) == 0
        return capsys.readouterr().out

    async def counted() -> bool:
        (node,) = json.loads(await shown("--json"))
        return bool(node["drafts"])

    drafting = dataclasses.replace(ENGINE, speculative="ngram")
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0, logit_bias=((20, 30.0),))
    async with running(redis_client, drafting, "unified") as (node,):
        answer = await dispatch(redis_client, "r-1", PROMPT, params, node)
        await wait_until(counted, "a beat says so")
        (said,) = json.loads(await shown("--json"))
        head, row = (await shown()).splitlines()
    assert said["speculative"] == "ngram"
    assert (said["drafted_tokens"], said["accepted_tokens"]) == (answer.drafted, answer.accepted)
    cells = dict(zip(head.split(), row.split(), strict=False))
    assert cells["DRAFTS"] == "ngram"
    assert cells["RIGHT"] == f"{answer.accepted / answer.drafted:.0%}"
    assert cells["LENGTH"] == f"{answer.accepted / said['drafts']:.1f}"
    assert cells["SAVED"] == f"{said['saved_ms'] / 1000:.1f}s"

    async with running(redis_client, ENGINE, "unified"):
        assert "DRAFTS" not in await shown(), "where nobody drafts there is nothing to see"


async def test_every_node_says_where_its_metrics_are_and_each_has_a_line_of_help(
    redis_client: RedisClient,
) -> None:
    async with running(redis_client, ENGINE, "unified") as (record,):
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{record.url}/metrics")).text
        found = await scrape(record.url)
    assert record.url.startswith("http://127.0.0.1:")
    helped = set(re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE))
    assert helped == set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert found.total("pdq_node_info") == 1


async def test_a_node_can_do_without(redis_client: RedisClient) -> None:
    async with running(redis_client, ENGINE, "unified", metrics=MetricsSettings(port=None)) as (record,):
        assert record.url == ""


async def test_pdq_nodes_says_who_does_not_keep_the_numerics_rule(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDQ_REDIS_URL", redis_client.settings.url)
    monkeypatch.setenv("PDQ_REDIS_PREFIX", redis_client.settings.prefix)
    registry = Registry(redis_client)
    for name, numerics in (("p-1", "cpu/own"), ("p-2", "reference/H200/flashinfer-0.7.4/unrepeatable")):
        await registry.announce(NodeRecord(name, name, Role.PREFILL, numerics=numerics))
    assert await asyncio.to_thread(inspect.nodes, ()) == 0
    _, _, _, *said = capsys.readouterr().out.splitlines()
    assert said == [
        "p-2 does not keep the numerics rule: the same request may give other tokens "
        "(reference/H200/flashinfer-0.7.4/unrepeatable)"
    ]
