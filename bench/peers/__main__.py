"""vLLM's handoff beside ours, in one run on one machine: `python -m bench.peers`.

    VLLM_PYTHON=…/bin/python python -m bench.peers --json rows.json

starts vLLM's prefill and decode servers (KV over NIXL) and ours, one core each, with the 0.5B body in
bf16 and random weights, and lets them take turns: while one is measured the others take no CPU. The
rows of several runs add up in the file that `--json` names; the table is of all of them. What each
figure means, and where it cannot mean the same in both systems, is in `handoff.py`.

vLLM needs an environment of its own with `vllm` (for CPU) and `nixl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
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

from bench.peers import handoff
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
    results = _earlier(arguments.json) or {"runs": [], "rows": []}
    rng = random.Random(f"{len(results['runs'])}")  # fresh prompts in each run
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdq-peers-")))
        (folder / "model").mkdir()
        model = make_model(folder / "model", handoff.POOL_TOKENS)
        systems = _systems(stack, arguments, model, folder, cores)
        for turn in range(arguments.rounds):
            first = (turn + len(results["runs"])) % len(systems)  # nobody is always the first
            for system in [*systems[first:], *systems[:first]]:
                _say(f"round {turn + 1}: {system.name}")
                rows += handoff.measure(system, model, arguments.lengths, arguments.prompts, rng)
    results["runs"].append(_about(arguments))
    results["rows"] += rows
    results["rows"].sort(key=lambda row: COLUMNS.index(row["system"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    _print(results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    stack: contextlib.ExitStack,
    arguments: argparse.Namespace,
    model: Model,
    folder: Path,
    cores: Sequence[int],
) -> list[System]:
    chosen = [name for name in SYSTEMS if name in arguments.systems]
    systems: list[System] = []
    if any(name.startswith("vllm") for name in chosen):
        _say("starting vLLM")
        python = arguments.vllm_python.absolute()  # a link into an environment: not resolved
        pair = stack.enter_context(VllmPair(python, model, folder, cores))
        systems += [Vllm(pair, reniced=name == "vllm-reniced") for name in chosen if name.startswith("vllm")]
    return systems + [Pdq(model, folder, name, cores) for name in chosen if "vllm" not in name]


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was run, and the versions of everything; no paths."""
    ours = {
        name: importlib.metadata.version(name)
        for name in ("torch", "nixl")
        if name != "nixl" or "nixl" in arguments.systems
    }
    theirs = versions(arguments.vllm_python) if arguments.vllm_python else {}
    return {
        "command": (
            f"python -m bench.peers --systems {' '.join(arguments.systems)} --rounds "
            f"{arguments.rounds} --prompts {arguments.prompts} --lengths "
            f"{' '.join(map(str, arguments.lengths))}"
        ),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "ours": {"python": platform.python_version(), **ours},
        "vllm": theirs,
    }


def _print(results: dict[str, Any]) -> None:
    for about in results["runs"]:
        print(f"$ {about['command']}")
    last = results["runs"][-1]
    print(f"{last['machine']}; ours: {_shown(last['ours'])}; vLLM's: {_shown(last['vllm'])}")
    print(handoff.report(results["rows"], REPORT_AGAINST))


def _say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:4.0f} s  {what}", file=sys.stderr, flush=True)


def _shown(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "none"


if __name__ == "__main__":
    main()
