"""The same closed-loop load on each system: throughput and latencies as `pdq bench` defines them.

So many requests are always open, prompts are fresh. TTFT is the user's: from the first byte of the
request (vLLM: of its first leg) to the first token that the user has.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from bench.peers.system import Completion, Model, System
from bench.peers.table import table
from common.commands.bench_client import read
from common.commands.bench_report import Outcome, summarize
from common.commands.bench_workload import Job

LOADS = {  # name → lengths of prompts, in turn
    "even": (256,),
    "mixed": (256, 256, 256, 2048, 256, 256, 256, 256),
}
POOL_TOKENS = 43_008  # of each server: room for all that are open
OPEN, OUTPUT, WARM_UP = 16, 64, 2

Row = dict[str, Any]

FIGURES = {  # label → where in the summary, factor, unit
    "output": (("output_tokens_per_s",), 1.0, "tok/s"),
    "TTFT mean": (("ttft_s", "mean"), 1e3, "ms"),
    "TTFT p90": (("ttft_s", "p90"), 1e3, "ms"),
    "TPOT mean": (("tpot_s", "mean"), 1e3, "ms"),
    "ITL p50": (("itl_s", "p50"), 1e3, "ms"),
    "ITL p99": (("itl_s", "p99"), 1e3, "ms"),
    "whole answer mean": (("e2e_s", "mean"), 1e3, "ms"),
}


def measure(system: System, model: Model, load: str, requests: int, rng: random.Random) -> Row:
    """One round of a load, after a few requests that are left out."""
    lengths = [LOADS[load][i % len(LOADS[load])] for i in range(requests)]
    jobs = [
        Job(index, 0.0, rng.choices(range(3, model.vocab_size), k=length), length, OUTPUT)
        for index, length in enumerate([min(LOADS[load])] * WARM_UP + lengths)
    ]
    with system.awake():
        summary = asyncio.run(_closed_loop(system, jobs))
    return {"system": system.name, "load": load, "requests": requests, "summary": summary}


async def _closed_loop(system: System, jobs: Sequence[Job]) -> dict[str, Any]:
    for job in jobs[:WARM_UP]:
        await system.complete(_ids(job), job.output_len)
    done: dict[int, Completion] = {}
    waiting = iter(jobs[WARM_UP:])

    async def one_after_another() -> None:
        for job in waiting:
            done[job.index] = await system.complete(_ids(job), job.output_len)

    start = time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(OPEN)))
    outcomes = [
        Outcome.of(job, c.sent_at, c.exchange, read(c.exchange), start)
        for job in jobs[WARM_UP:]
        for c in [done[job.index]]
    ]
    return summarize(outcomes, None, None)


def _ids(job: Job) -> Sequence[int]:
    assert isinstance(job.prompt, list)
    return job.prompt


def report(rows: Sequence[Row], against: str) -> str:
    """A table for each load."""
    names = list(dict.fromkeys(row["system"] for row in rows))
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        group = {n: [r for r in rows if r["load"] == load and r["system"] == n] for n in names}
        counts = ", ".join(f"{n} {[r['requests'] for r in found]}" for n, found in group.items())
        figures = {
            f"{label}, {unit}": {n: [_get(r, path) * factor for r in group[n]] for n in names}
            for label, (path, factor, unit) in FIGURES.items()
        }
        lengths = ", ".join(map(str, LOADS[load]))
        lines += [
            "", f"{load}: {OPEN} open, prompts of {lengths} tokens in turn, {OUTPUT} out; median "
            f"(least–most) of rounds; requests in each: {counts}", *table(figures, against),
        ]  # fmt: skip
    return "\n".join(lines)


def _get(row: Row, path: Sequence[str]) -> float:
    value = row["summary"]
    for part in path:
        value = value[part]
    return float(value)
