"""What the commands share: who takes part, whose turn it is, and the file that rows add up in."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.peers import servers
from bench.peers.system import Model, make_model

POOL_TOKENS = 24 * 1024
BEGAN = time.monotonic()
Item = TypeVar("Item")
Results = dict[str, Any]
"""`runs`: what was run, by what versions; `rows`: what was measured, each with its run's number."""


def parser_of(command: str, about: str | None) -> argparse.ArgumentParser:
    """For a command of bench.peers, whose module says what it is `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.peers {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "peers",
        nargs="*",
        type=_peer,
        metavar="PEER=PYTHON",
        help=f"a peer ({', '.join(servers.SYSTEMS)}) and the python of its environment",
    )
    parser.add_argument("--systems", nargs="+", choices=servers.SHOWN, help="only these")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="rows are added to those in this file")


def _peer(text: str) -> tuple[str, Path]:
    name, _, python = text.partition("=")
    if name not in servers.SYSTEMS or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(servers.SYSTEMS)} with =PYTHON")
    if not Path(python).exists():
        raise argparse.ArgumentTypeError(f"there is no {python}")
    return name, Path(python).absolute()  # a link into an environment: not resolved


def chosen_systems(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of `servers.SHOWN`, in its order: all that can be run, or those of --systems."""
    possible = {*servers.OURS, *(name for peer, _ in arguments.peers for name in servers.SYSTEMS[peer])}
    if missing := [name for name in arguments.systems or () if name not in possible]:
        parser.error(f"{', '.join(missing)}: name the python of the peer as PEER=PYTHON")
    return [name for name in servers.SHOWN if name in (arguments.systems or possible)]


@contextlib.contextmanager
def started(
    chosen: Sequence[str], pythons: Mapping[str, Path]
) -> Iterator[tuple[Model, list[servers.Server]]]:
    """The model that all get, and the chosen systems, asleep."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdq-peers-")))
        (folder / "model").mkdir()
        model = make_model(folder / "model", POOL_TOKENS, checkpoint="transformers" in chosen)
        say(f"starting {', '.join(chosen)}")
        yield model, servers.start(stack, chosen, pythons, model, folder, two_cores())


def two_cores() -> list[int]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for each server of a pair")
    return cores


def earlier(path: Path | None) -> Results:
    if path is None or not path.exists():
        return {"runs": [], "rows": []}
    found: Results = json.loads(path.read_text())
    return found


def save(results: Results, path: Path | None) -> None:
    """After each row, so that a run that is cut off leaves what it measured."""
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


def turns(items: Sequence[Item], number: int) -> list[Item]:
    """Everybody once, another first each time."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def about(command: str, pythons: Mapping[str, Path]) -> Results:
    """What was run, and the versions of everything; no paths."""
    return {
        "command": command,
        "commit": _commit(),
        "machine": f"{platform.platform()}, {_processor()}, {os.cpu_count()} cores",
        "versions": {
            "ours": {"python": platform.python_version()} | servers.versions(Path(sys.executable)),
            **{peer: servers.versions(python) for peer, python in pythons.items()},
        },
    }


def heading(results: Mapping[str, Any]) -> list[str]:
    """What all runs were, and on what."""
    return [
        *(f"$ python -m bench.peers {run['command']}   ({run['commit']})" for run in results["runs"]),
        *dict.fromkeys(run["machine"] for run in results["runs"]),
        *dict.fromkeys(shown_versions(run) for run in results["runs"]),
    ]


def shown_versions(run: Results) -> str:
    return "; ".join(
        f"{who}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for who, found in run["versions"].items()
    )


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:4.0f} s  {what}", file=sys.stderr, flush=True)


def _commit() -> str:
    reply = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return reply.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
