"""Other systems beside ours, in one run on one machine: `python -m bench.peers handoff|load`.

    VLLM_PYTHON=…/bin/python python -m bench.peers handoff --json rows.json

starts vLLM's prefill and decode servers and ours, one core each, with the 0.5B body in bf16 and
random weights, and lets them take turns: while one is measured the others take no CPU. The rows of
several runs add up in the file that `--json` names; the table is of all of them. What each figure
means, and where it cannot mean the same in both systems, is in `handoff.py` and `load.py`.

vLLM needs an environment of its own with `vllm` (for CPU) and `nixl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers import handoff, load
from bench.peers.pdq import Pdq
from bench.peers.system import Model, System, make_model
from bench.peers.vllm import Vllm, VllmPair, versions

SYSTEMS = ("vllm", "vllm-reniced", "shm", "tcp", "nixl")
REPORT_AGAINST = "vLLM, reniced"
COLUMNS = ["vLLM", REPORT_AGAINST, "pdq, shm", "pdq, tcp", "pdq, nixl"]
BEGAN = time.monotonic()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended
    arguments = _parse()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for each server")
    results = _earlier(arguments.json) or {"measures": arguments.measure, "runs": [], "rows": []}
    if results["measures"] != arguments.measure:
        raise SystemExit(f"{arguments.json} has rows of another measurement")
    rng = random.Random(f"{len(results['runs'])}")  # fresh prompts in each run
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdq-peers-")))
        (folder / "model").mkdir()
        measured = handoff if arguments.measure == "handoff" else load
        model = make_model(folder / "model", measured.POOL_TOKENS)
        systems = _systems(stack, arguments, model, folder, cores)
        for turn in range(arguments.rounds):
            first = (turn + len(results["runs"])) % len(systems)  # nobody is always the first
            for system in [*systems[first:], *systems[:first]]:
                _say(f"round {turn + 1}: {system.name}")
                rows += _measure(arguments, system, model, rng)
    results["runs"].append(_about(arguments))
    results["rows"] += rows
    results["rows"].sort(key=lambda row: COLUMNS.index(row["system"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    _print(results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("measure", choices=["handoff", "load"])
    parser.add_argument("--vllm-python", type=Path, default=os.environ.get("VLLM_PYTHON"),
                        help="the python of vLLM's environment (or VLLM_PYTHON)")  # fmt: skip
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048], help="handoff only")
    parser.add_argument("--prompts", type=int, default=2, help="of each length and round; handoff")
    parser.add_argument("--loads", nargs="+", choices=load.LOADS, default=list(load.LOADS))
    parser.add_argument(
        "--requests", type=int, default=32, help="of each load and round; load only"
    )
    parser.add_argument("--json", type=Path, help="rows are added to those in this file")
    arguments = parser.parse_args()
    if any(name.startswith("vllm") for name in arguments.systems) and not arguments.vllm_python:
        parser.error("name vLLM's python with --vllm-python, or leave vLLM out with --systems")
    return arguments


def _earlier(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _systems(
    stack: contextlib.ExitStack, arguments: argparse.Namespace, model: Model, folder: Path,
    cores: Sequence[int],
) -> list[System]:  # fmt: skip
    chosen = [name for name in SYSTEMS if name in arguments.systems]
    systems: list[System] = []
    if any(name.startswith("vllm") for name in chosen):
        _say("starting vLLM")
        python = arguments.vllm_python.absolute()  # a link into an environment: not resolved
        pair = stack.enter_context(VllmPair(python, model, folder, cores))
        systems += [Vllm(pair, reniced=name == "vllm-reniced")
                    for name in chosen if name.startswith("vllm")]  # fmt: skip
    return systems + [Pdq(model, folder, name, cores) for name in chosen if "vllm" not in name]


def _measure(
    arguments: argparse.Namespace, system: System, model: Model, rng: random.Random
) -> list[dict[str, Any]]:
    if arguments.measure == "handoff":
        return handoff.measure(system, model, arguments.lengths, arguments.prompts, rng)
    return [load.measure(system, model, name, arguments.requests, rng) for name in arguments.loads]


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command without paths, and the versions of everything."""
    pairs = itertools.pairwise(["", *sys.argv[1:]])
    shown = [
        word
        for before, word in pairs
        if before not in ("--vllm-python", "--json") and word not in ("--vllm-python", "--json")
    ]
    ours = {name: importlib.metadata.version(name) for name in ("torch", "nixl")
            if name != "nixl" or "nixl" in arguments.systems}  # fmt: skip
    theirs = versions(arguments.vllm_python) if arguments.vllm_python else {}
    return {
        "command": " ".join(["python -m bench.peers", *shown]),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "ours": {"python": platform.python_version(), **ours},
        "vllm": theirs,
    }


def _print(results: dict[str, Any]) -> None:
    for about in results["runs"]:
        print(f"$ {about['command']}")
    last = results["runs"][-1]
    print(f"{last['machine']}; ours: {_shown(last['ours'])}; vLLM's: {_shown(last['vllm'])}")
    module = handoff if results["measures"] == "handoff" else load
    print(module.report(results["rows"], REPORT_AGAINST))


def _say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:4.0f} s  {what}", file=sys.stderr, flush=True)


def _shown(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "none"


if __name__ == "__main__":
    main()
