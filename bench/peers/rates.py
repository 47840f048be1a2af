"""Chats at a rate, with bursts between them: who is served in time, and how many of them.

Chats arrive as a Poisson process, with lengths from a trace, scaled down to the machine; beside them a prompt
of 2,048 tokens comes every 15 seconds, whatever the rate. Every system gets the same requests at the same
moments. A request is in time if it keeps both parts of a target: the first token within its limit, and no gap
between two tokens longer than its limit. Goodput is requests in time per second of arrivals; one that fails,
or is not finished when the time to drain is over, is not in time. Bursts count as requests too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.loads import RESERVED_IDS
from bench.peers.servers import Server
from common.commands.bench.client import Exchange, read
from common.commands.bench.report import percentile
from common.commands.bench.workload import arrivals, draw_lengths

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a user asks of a reply."""

    name: str
    first_token_s: float
    gap_s: float


TARGETS = (
    Target("steady: first token in 8 s, no gap over 0.2 s", 8.0, 0.2),
    Target("prompt: first token in 2 s, no gap over 2 s", 2.0, 2.0),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Mix:
    """The load but for its rate."""

    seconds: float = 40.0  # of arrivals
    drain_s: float = 20.0
    scale: float = 0.25  # of the trace's lengths
    longest: tuple[int, int] = (1024, 128)  # prompt and output of a chat
    burst: tuple[int, int] = (2048, 16)
    burst_every_s: float = 15.0
    first_burst_s: float = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    due_s: float
    prompt: int  # tokens
    output: int
    chat: bool


def schedule(rate: float, mix: Mix, trace: Sequence[tuple[int, int]], seed: int) -> list[Arrival]:
    """All arrivals of one point, in order; a function of its arguments alone."""
    rng = random.Random(f"{seed} {rate}")
    count = math.ceil(3 * rate * mix.seconds) + 10  # more than come in that time
    first = rng.expovariate(rate)
    moments = [first + moment for moment in arrivals(count, rate, rng)]
    lengths = draw_lengths(trace, count, mix.scale, rng)
    chats = [
        Arrival(due, min(prompt, mix.longest[0]), max(2, min(output, mix.longest[1])), True)
        for due, (prompt, output) in zip(moments, lengths, strict=True)
        if due < mix.seconds
    ]
    bursts = []
    due = mix.first_burst_s
    while due < mix.seconds:
        bursts.append(Arrival(due, *mix.burst, False))
        due += mix.burst_every_s
    return sorted([*chats, *bursts], key=lambda arrival: arrival.due_s)


async def measure(
    server: Server, planned: Sequence[Arrival], mix: Mix, vocab_size: int, rng: random.Random
) -> list[Row]:
    """A row for each arrival: `chat`, `failed`, `ttft_s`, `gaps_s`. A first token that never came counts as
    late as it was waited for."""
    prompts = [rng.choices(range(RESERVED_IDS, vocab_size), k=arrival.prompt) for arrival in planned]
    start = time.monotonic() + 0.1
    exchanges, tasks = [], []
    for arrival, prompt in zip(planned, prompts, strict=True):
        await asyncio.sleep(max(0.0, start + arrival.due_s - time.monotonic()))
        exchange = Exchange(start + arrival.due_s)
        exchanges.append(exchange)
        tasks.append(asyncio.create_task(server.stream(prompt, arrival.output, exchange)))
    end = start + mix.seconds + mix.drain_s
    await asyncio.wait(tasks, timeout=max(0.0, end - time.monotonic()))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [
        outcome(arrival.chat, exchange, end) for arrival, exchange in zip(planned, exchanges, strict=True)
    ]


def outcome(chat: bool, exchange: Exchange, end: float) -> Row:
    """Of a request that was due at `sent_at`; `end`: when nobody waited any more."""
    answer = read(exchange)
    times = answer.token_times
    return {
        "chat": chat,
        "failed": answer.error,
        "ttft_s": (times[0] if times else end) - exchange.sent_at,
        "gaps_s": [after - before for before, after in itertools.pairwise(times)],
    }


# ── What it means ────────────────────────────────────────────────────────────────────────────────


def in_time(row: Row, target: Target) -> bool:
    if row["failed"]:
        return False
    late = row["ttft_s"] > target.first_token_s
    return not late and max(row["gaps_s"], default=0.0) <= target.gap_s


def summary(rows: Sequence[Row], mix: Mix) -> dict[str, float]:
    """One point of one system. Percentiles are of chats, with those that were cut off."""
    chats = [row for row in rows if row["chat"]]
    first = sorted(row["ttft_s"] for row in chats)
    gaps = sorted(gap for row in chats for gap in row["gaps_s"])
    found = {
        f"{name}_p{percent}_s": percentile(values, percent)
        for name, values in (("ttft", first), ("gap", gaps))
        for percent in (50, 99)
    }
    found |= {
        f"goodput {target.name}": sum(in_time(row, target) for row in rows) / mix.seconds
        for target in TARGETS
    }
    return found | {"offered": len(rows) / mix.seconds, "failed": sum(bool(row["failed"]) for row in rows)}


def medians(points: Sequence[Row]) -> dict[str, dict[float, dict[str, float]]]:
    """System → rate → figures, each the median of that point's rounds."""
    found: dict[str, dict[float, list[Mapping[str, float]]]] = {}
    for point in points:
        found.setdefault(point["system"], {}).setdefault(point["rate"], []).append(point["figures"])
    return {
        system: {
            rate: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
            for rate, rounds in sorted(of.items())
        }
        for system, of in found.items()
    }
