"""The comparison with peers, as far as it needs no peer: its loads on ours, with the model that ships."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random

from bench.peers import compare_loads, rates
from bench.peers.loads import LOADS, Sizes
from bench.peers.servers import Pdq
from bench.peers.system import Model
from common.model_files import SHIPPED_MODEL

SIZES = Sizes(
    stream=(16, 8),
    batch=(4, 32, 4),
    prompt=128,
    chats=(2, 16, 1900),
    bursts=2,
    calm_s=0.1,
    burst_every_s=0.05,
)


def shipped() -> Model:
    vocabulary = json.loads((SHIPPED_MODEL / "config.json").read_text())["vocab_size"]
    return Model(SHIPPED_MODEL, vocabulary, kv_bytes_per_token=0, pool_tokens=8192, load_format="auto")


def test_every_load_gives_its_figures_on_ours() -> None:
    model, rng = shipped(), random.Random(0)
    system = Pdq(model, sorted(os.sched_getaffinity(0))[:2], disaggregated=True)
    rows = compare_loads.measure(system, model, list(LOADS), rng, SIZES)
    figures = {row["load"]: row.get("figures", row.get("failed")) for row in rows}
    for figure in compare_loads.FIGURES:
        found = figures[figure.load][figure.key]
        # A small model's tokens may come several at a time, with no time between them.
        assert found > 0 or (found == 0.0 and ("p50" in figure.key or figure.key == "tpot_s")), figures


def test_every_arrival_is_answered_on_ours() -> None:
    model, rng = shipped(), random.Random(0)
    system = Pdq(model, sorted(os.sched_getaffinity(0))[:2], disaggregated=False)
    mix = dataclasses.replace(rates.Mix(), seconds=1.0, burst=(128, 4), first_burst_s=0.5)
    planned = rates.schedule(8.0, mix, [(128, 32)], seed=0)
    with system.awake():
        rows = asyncio.run(rates.measure(system, planned, mix, model.vocab_size, rng))
    assert len(rows) == len(planned)
    assert [row["chat"] for row in rows] == [arrival.chat for arrival in planned]
    assert all(not row["failed"] and row["ttft_s"] > 0 for row in rows)
    for row, arrival in zip(rows, planned, strict=True):
        assert 0 < len(row["gaps_s"]) < arrival.output  # a token that ends in half a character is no event
