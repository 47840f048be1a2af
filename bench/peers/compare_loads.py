"""Ours and every installed peer over HTTP under the same loads: `python -m bench.peers loads`.

    python -m bench.peers loads vllm=…/bin/python transformers=…/bin/python --rounds 3 --json rows.json

The loads are in `loads.py`, the systems in `servers.py`, the limits that shares are of in `bounds.py`. The
limits are measured between any two systems; a share is of the larger of those before and after. `--rounds 0`
measures nothing: it only prints what the file of --json has.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.engine import BODY
from bench.limits import Limits, measure_limits
from bench.peers import servers, session
from bench.peers.bounds import Body
from bench.peers.loads import LOADS, Load, Sizes
from bench.peers.servers import Server
from bench.peers.system import Model
from bench.peers.table import line, spreads

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: `key` of `load`."""

    label: str
    load: str
    key: str
    factor: float = 1.0
    more_is_better: bool = False


FIGURES = (
    Figure("one stream, tok/s", "stream", "tokens_per_s", more_is_better=True),
    Figure("  first token of it, ms", "stream", "ttft_s", 1e3),
    Figure("16 at once, tok/s", "batch", "tokens_per_s", more_is_better=True),
    Figure("  first token, s", "batch", "ttft_s"),
    Figure("  per token after, ms", "batch", "tpot_s", 1e3),
    Figure("prompt of 2,048, tok/s", "prompt", "tokens_per_s", more_is_better=True),
    Figure("  again (cached), ms", "prompt", "cached_s", 1e3),
    Figure("between tokens, p50, ms", "bursts", "calm_p50_s", 1e3),
    Figure("  calm p99, ms", "bursts", "calm_p99_s", 1e3),
    Figure("  p50 in bursts, ms", "bursts", "burst_p50_s", 1e3),
    Figure("  p99 in bursts, ms", "bursts", "burst_p99_s", 1e3),
    Figure("  longest in bursts, ms", "bursts", "burst_max_s", 1e3),
    Figure("  first token of 2,048, s", "bursts", "burst_ttft_s"),
)
BEST = "best peer"
WIDE = 30  # columns of ratios
COMPARED = (  # who is divided by whom, as the tables name them
    ("pdq", BEST),
    ("pdq", "vLLM"),
    ("pdq 1P1D", "vLLM 1P1D"),
    ("pdq 1P1D", "vLLM 1P1D reniced"),
    ("pdq 1P1D", "pdq"),
)
OURS = {servers.SHOWN[name] for name in servers.OURS}


def main(argv: Sequence[str]) -> None:
    parser = session.parser_of("loads", __doc__)
    session.add_arguments(parser)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    arguments = parser.parse_args(argv)
    chosen = session.chosen_systems(arguments, parser)
    results = session.earlier(arguments.json)
    if arguments.rounds:
        _measure(arguments, chosen, results)
    print(report(results, Body.read(BODY / "config.json")))


def _measure(arguments: argparse.Namespace, chosen: Sequence[str], results: session.Results) -> None:
    pythons = dict(arguments.peers)
    number = len(results["runs"])
    rng = random.Random(number)  # fresh prompts in each run
    command = f"loads --systems {' '.join(chosen)} --loads {' '.join(arguments.loads)}"
    results["runs"].append(session.about(f"{command} --rounds {arguments.rounds}", pythons))
    with session.started(chosen, pythons) as (model, systems):
        before = measure_limits()
        for turn in range(arguments.rounds):
            for system in session.turns(systems, turn + number):
                session.say(f"round {turn + 1}: {system.name}")
                rows = measure(system, model, arguments.loads, rng)
                after = measure_limits()
                limits = dataclasses.asdict(larger(before, after))
                results["rows"] += [row | {"run": number, "limits": limits} for row in rows]
                session.save(results, arguments.json)
                before = after


def measure(
    system: Server, model: Model, loads: Sequence[str], rng: random.Random, sizes: Sizes | None = None
) -> list[Row]:
    """A row for each load, of one waking. A load that failed says so in place of its figures."""
    rows: list[Row] = []
    load = Load(system, model.vocab_size, sizes or Sizes(), rng)
    with system.awake():
        asyncio.run(load.warm_up())
        for name in loads:
            row: Row = {"system": system.name, "load": name}
            try:
                row["figures"] = asyncio.run(_figures(load, name))
            except RuntimeError as error:
                session.say(str(error))
                row["failed"] = str(error)[:200]
            rows.append(row)
    return rows


async def _figures(load: Load, name: str) -> Mapping[str, float]:
    return await LOADS[name](load)


def larger(one: Limits, other: Limits) -> Limits:
    """Other load only ever makes them smaller."""
    return Limits(max(one.matmul_flops, other.matmul_flops), max(one.read_bytes, other.read_bytes))


# ── The tables ───────────────────────────────────────────────────────────────────────────────────


def report(results: Mapping[str, Any], body: Body) -> str:
    """All rows of all runs: figures, shares of the limits, and ratios of medians."""
    rows = [row for row in results["rows"] if "figures" in row]
    names = [name for name in servers.SHOWN.values() if any(row["system"] == name for row in rows)]
    figures = {figure.label: {name: _values(rows, name, figure) for name in names} for figure in FIGURES}
    limits = [Limits(**row["limits"]) for row in rows]
    lines = [
        *session.heading(results),
        f"limits in between: matmul {_range([limit.matmul_flops / 1e9 for limit in limits])} GFLOP/s, "
        f"read {_range([limit.read_bytes / 1e9 for limit in limits])} GB/s",
        "",
        "median (least–most)",
        *spreads(figures),
        "",
        "share of the machine's limit (both cores)",
        *spreads(shares(rows, names, body, Sizes())),
        "",
        "times better, by medians: above 1 the first is ahead",
        *ratio_lines(figures),
    ]
    if failed := [row for row in results["rows"] if "failed" in row]:
        lines += ["", *(f"failed: {row['system']}, {row['load']}: {row['failed']}" for row in failed)]
    return "\n".join(lines)


def shares(
    rows: Sequence[Row], names: Sequence[str], body: Body, sizes: Sizes
) -> dict[str, dict[str, list[float]]]:
    """Label → system → tokens per second over what the limits of that moment allow."""
    bounds: dict[str, tuple[str, Callable[[Limits], float]]] = {
        "stream": ("one stream", lambda limits: body.stream_tokens_per_s(*sizes.stream, limits)),
        "batch": ("16 at once", lambda limits: body.batch_tokens_per_s(*sizes.batch, limits)),
        "prompt": ("prompt of 2,048", lambda limits: body.prompt_tokens_per_s(sizes.prompt, limits)),
    }
    return {
        label: {
            name: [
                row["figures"]["tokens_per_s"] / bound(Limits(**row["limits"]))
                for row in rows
                if row["system"] == name and row["load"] == load
            ]
            for name in names
        }
        for load, (label, bound) in bounds.items()
    }


def ratio_lines(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """A column for each pair of `COMPARED` that was measured."""
    names = {name for of in figures.values() for name in of}
    pairs = [(a, b) for a, b in COMPARED if a in names and (b in names or (b == BEST and names - OURS))]
    lines = [line("", [f"{a} / {b}" for a, b in pairs], WIDE)]
    for figure in FIGURES:
        medians = {name: statistics.median(of) for name, of in figures[figure.label].items() if of}
        cells = [ratio(medians, a, b, more_is_better=figure.more_is_better) for a, b in pairs]
        lines.append(line(figure.label.rpartition(",")[0], cells, WIDE))
    return lines


def ratio(medians: Mapping[str, float], ours: str, theirs: str, *, more_is_better: bool) -> str:
    """How many times better; of the best peer also its name."""
    if theirs == BEST:
        peers = [name for name in medians if name not in OURS]
        if not peers:
            return "–"
        theirs = (max if more_is_better else min)(peers, key=lambda name: medians[name])
        shown = f" ({theirs})"
    else:
        shown = ""
    if ours not in medians or theirs not in medians:
        return "–"
    value = medians[ours] / medians[theirs]
    return f"{value if more_is_better else 1 / value:.2f}{shown}"


def _values(rows: Sequence[Row], name: str, figure: Figure) -> list[float]:
    return [
        row["figures"][figure.key] * figure.factor
        for row in rows
        if row["system"] == name and row["load"] == figure.load
    ]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if values else "–"
