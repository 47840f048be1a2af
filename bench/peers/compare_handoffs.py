"""vLLM's handoff beside ours, in one run on one machine: `python -m bench.peers handoff`.

    VLLM_PYTHON=…/bin/python python -m bench.peers handoff --json rows.json

starts vLLM's prefill and decode servers (KV over NIXL) and ours, one core each, with the 0.5B body in
bf16 and random weights, and lets them take turns: while one is measured the others take no CPU. The
rows of several runs add up in the file that `--json` names; the table is of all of them. What each
figure means, and where it cannot mean the same in both systems, is in `handoff.py`.

vLLM needs an environment of its own with `vllm` (for CPU) and `nixl`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers import handoff
from bench.peers.pdq import Pdq
from bench.peers.session import about, earlier, parser_of, save, say, shown_versions, turns, two_cores
from bench.peers.system import Model, System, make_model
from bench.peers.vllm import Vllm, VllmPair

SYSTEMS = ("vllm", "vllm-reniced", "shm", "tcp", "nixl")
REPORT_AGAINST = "vLLM, reniced"
COLUMNS = ["vLLM", REPORT_AGAINST, "pdq, shm", "pdq, tcp", "pdq, nixl"]


def main(argv: Sequence[str]) -> None:
    arguments = _parse(argv)
    cores = two_cores()
    results = earlier(arguments.json)
    rng = random.Random(f"{len(results['runs'])}")  # fresh prompts in each run
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdq-peers-")))
        (folder / "model").mkdir()
        model = make_model(folder / "model", handoff.POOL_TOKENS)
        systems = _systems(stack, arguments, model, folder, cores)
        for turn in range(arguments.rounds):
            for system in turns(systems, turn + len(results["runs"])):
                say(f"round {turn + 1}: {system.name}")
                rows += handoff.measure(system, model, arguments.lengths, arguments.prompts, rng)
    pythons = {"vllm": arguments.vllm_python} if arguments.vllm_python else {}
    results["runs"].append(about(_command(arguments), pythons))
    results["rows"] += rows
    results["rows"].sort(key=lambda row: COLUMNS.index(row["system"]))
    save(results, arguments.json)
    _print(results)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("handoff", __doc__)
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=os.environ.get("VLLM_PYTHON"),
        help="the python of vLLM's environment (or VLLM_PYTHON)",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048], help="of prompts")
    parser.add_argument("--prompts", type=int, default=2, help="of each length and round")
    parser.add_argument("--json", type=Path, help="rows are added to those in this file")
    arguments = parser.parse_args(argv)
    if any(name.startswith("vllm") for name in arguments.systems) and not arguments.vllm_python:
        parser.error("name vLLM's python with --vllm-python, or leave vLLM out with --systems")
    return arguments


def _systems(
    stack: contextlib.ExitStack,
    arguments: argparse.Namespace,
    model: Model,
    folder: Path,
    cores: Sequence[int],
) -> list[System]:
    chosen = [name for name in SYSTEMS if name in arguments.systems]
    systems: list[System] = []
    if any(name.startswith("vllm") for name in chosen):
        say("starting vLLM")
        python = arguments.vllm_python.absolute()  # a link into an environment: not resolved
        pair = stack.enter_context(VllmPair(python, model, folder, cores))
        systems += [Vllm(pair, reniced=name == "vllm-reniced") for name in chosen if name.startswith("vllm")]
    return systems + [Pdq(model, folder, name, cores) for name in chosen if "vllm" not in name]


def _command(arguments: argparse.Namespace) -> str:
    return (
        f"handoff --systems {' '.join(arguments.systems)} --rounds {arguments.rounds} "
        f"--prompts {arguments.prompts} --lengths {' '.join(map(str, arguments.lengths))}"
    )


def _print(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        print(f"$ python -m bench.peers {run['command']}   ({run['commit']})")
    last = results["runs"][-1]
    print(f"{last['machine']}; {shown_versions(last)}")
    print(handoff.report(results["rows"], REPORT_AGAINST))
