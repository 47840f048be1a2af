"""Latency and goodput over the request rate, with plots: `python -m bench.peers rates`.

    python -m bench.peers rates vllm=…/bin/python --trace lengths.csv --json rows.json --plots FOLDER

The load and the targets are in `rates.py`. The systems take turns, each at all rates. `--rounds 0` measures
nothing: it only prints and draws what the file of --json has.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers import plots, servers, session
from bench.peers.loads import Load, Sizes
from bench.peers.rates import Mix, measure, medians, schedule, summary
from common.commands.bench.workload import read_trace

DEFAULT_TRACE = [(1024, 192)]  # without a file: all chats alike
HEADINGS = {
    "ttft_p50_s": "first p50, s",
    "ttft_p99_s": "first p99, s",
    "gap_p50_s": "gap p50, s",
    "gap_p99_s": "gap p99, s",
    "failed": "cut off",
    "offered": "offered, /s",
}


def main(argv: Sequence[str]) -> None:
    parser = session.parser_of("rates", __doc__)
    session.add_arguments(parser)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="chats per second")
    parser.add_argument("--seconds", type=float, default=Mix().seconds, help="of arrivals at each rate")
    parser.add_argument("--trace", type=Path, help="CSV or JSONL with lengths of prompts and outputs")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where pictures are written")
    arguments = parser.parse_args(argv)
    chosen = session.chosen_systems(arguments, parser)
    results = session.earlier(arguments.json)
    if arguments.rounds:
        _measure(arguments, chosen, results)
    curves = medians(results["rows"])
    print(report(results, curves))
    if arguments.plots:
        machine = results["runs"][-1]["machine"]
        plots.draw(curves, arguments.plots, f"llama-454m, two cores ({machine})")


def _measure(arguments: argparse.Namespace, chosen: Sequence[str], results: session.Results) -> None:
    pythons = dict(arguments.peers)
    trace = read_trace(arguments.trace) if arguments.trace else DEFAULT_TRACE
    mix = dataclasses.replace(Mix(), seconds=arguments.seconds)
    number = len(results["runs"])
    results["runs"].append(session.about(_command(arguments, chosen), pythons))
    with session.started(chosen, pythons) as (model, systems):
        for turn in range(arguments.rounds):
            for system in session.turns(systems, turn + number):
                with system.awake():
                    asyncio.run(Load(system, model.vocab_size, Sizes(), random.Random(number)).warm_up())
                    for rate in arguments.rates:
                        session.say(f"round {turn + 1}: {system.name} at {rate:g}")
                        rng = random.Random(f"{number} {turn} {rate} {system.name}")
                        planned = schedule(rate, mix, trace, seed=turn)
                        rows = asyncio.run(measure(system, planned, mix, model.vocab_size, rng))
                        point = {"run": number, "system": system.name, "rate": rate}
                        results["rows"].append(point | {"figures": summary(rows, mix)})
                        session.save(results, arguments.json)


def _command(arguments: argparse.Namespace, chosen: Sequence[str]) -> str:
    rates = " ".join(f"{rate:g}" for rate in arguments.rates)
    trace = f" --trace {arguments.trace.name}" if arguments.trace else ""
    return (
        f"rates --systems {' '.join(chosen)} --rates {rates} --seconds {arguments.seconds:g} "
        f"--rounds {arguments.rounds}{trace}"
    )


def report(results: Mapping[str, Any], curves: plots.Curves) -> str:
    """A line for each rate and system."""
    goodput = [key for key in next(iter(next(iter(curves.values())).values())) if key.startswith("goodput")]
    lines = [
        *session.heading(results),
        "",
        *(f"goodput {number}: {key.removeprefix('goodput ')}" for number, key in enumerate(goodput, 1)),
        "",
    ]
    keys = [*HEADINGS, *goodput]
    labels = [*HEADINGS.values(), *(f"goodput {number}, /s" for number in range(1, len(goodput) + 1))]
    lines.append(f"  {'chats/s':8}{'':20}" + "".join(f"{label:>15}" for label in labels))
    for rate in sorted({rate for points in curves.values() for rate in points}):
        for system in (name for name in servers.SHOWN.values() if rate in curves.get(name, {})):
            cells = "".join(f"{curves[system][rate][key]:>15.3f}" for key in keys)
            lines.append(f"  {rate:<8g}{system:20}{cells}")
    return "\n".join(lines)
