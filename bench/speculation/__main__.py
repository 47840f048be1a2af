"""What speculation gains, and that it costs nobody: `python -m bench.speculation stories letters`.

    python -m bench.widened ../shared/models/stories260K build/widened
    python -m bench.speculation stories unrelated letters --streams 1 16 64 --json rows.json

Proposers take turns in one process, after a warm-up of each, on the same prompts and seeds: the machine's
drift hits all alike. Figures are output tokens per second from when all prompts are computed. Each is shown
as its ratio to `off` in the same round, and to the ideal: that every step takes as long as one without
drafts, and yields as many tokens as ours did. `same` says whether the tokens were those of `off`.

Kinds of text are in kinds.py. `copied` needs a model that follows instructions (bench/from_gguf.py). With
`--peers`, other engines take their turns beside ours (bench/peers/speculation.py): each is named with the
python of its environment, as in `vllm=/path/bin/python`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.limits import Limits, measure_limits
from bench.speculation import kinds, report
from bench.speculation.kinds import Kind
from bench.speculation.report import OURS
from bench.speculation.runs import Measured, Ours, Peer, Run, Work

SHARED = Path("../shared")
TOKENS = {1: 128, 16: 64, 64: 32}  # of a reply, by streams
PEERS_TAKE = {  # system: (proposers, most streams)
    "transformers": (("ngram", "draft"), 1),  # it assists one stream only
    "vllm": (("ngram",), 64),
    "openvino": (("ngram", "draft"), 64),
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
}
BEGAN = time.monotonic()


def main() -> None:
    arguments = _parse()
    about: dict[str, Any] = {
        "command": "python -m bench.speculation " + " ".join(_shown_flags(sys.argv[1:])),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "limits": [_limits(measure_limits())],
    }
    rows: list[dict[str, Any]] = []
    for name in arguments.kinds:
        rows += _measure(_kind(name, arguments), arguments)
    about["limits"].append(_limits(measure_limits()))
    results = {"runs": [about], "rows": rows}
    if arguments.json:
        if arguments.json.exists():
            earlier = json.loads(arguments.json.read_text())
            results = {name: earlier[name] + results[name] for name in results}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report.text(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="+", choices=("stories", "unrelated", "letters", "copied"))
    parser.add_argument("--model", type=Path, default=Path("build/widened"), help="writes stories")
    parser.add_argument("--draft", type=Path, default=SHARED / "models/stories124K-draft")
    parser.add_argument("--copying-model", type=Path, default=Path("build/smollm2"), help="for `copied`")
    parser.add_argument("--prompts", type=Path, default=SHARED / "data/prompts", help="folder")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], choices=TOKENS)
    parser.add_argument("--temperatures", type=float, nargs="+", help="those of the kind, if none are named")
    parser.add_argument("--proposers", nargs="+", help="those of the kind, if none are named")
    parser.add_argument("--tokens", type=int, help="of a reply (128, 64 and 32 for 1, 16 and 64 streams)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of ours")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: for one thread, where other work takes turns with it",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240, help="no round begins that would end later")
    parser.add_argument("--peers", nargs="+", default=[], metavar="SYSTEM=PYTHON")
    parser.add_argument("--json", type=Path, help="rows are added to those in this file")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and (arguments.threads > 1 or arguments.peers):
        parser.error("--clock cpu measures one thread of ours: use --threads 1, without --peers")
    return arguments


def _kind(name: str, arguments: argparse.Namespace) -> Kind:
    if name == "stories":
        return kinds.stories(arguments.model, arguments.draft)
    if name == "unrelated":
        return kinds.unrelated(arguments.model, arguments.draft, Path("build/unrelated-draft"))
    if name == "letters":
        return kinds.letters(arguments.model)
    return kinds.copied(arguments.copying_model, arguments.prompts)


def _measure(kind: Kind, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every system and proposer on one kind of text, in turns."""
    temperatures = arguments.temperatures or kind.temperatures
    engines = _engines(kind, arguments)
    rows: list[dict[str, Any]] = []
    longest = 0.0
    for turn in range(arguments.rounds + 1):  # the first one warms up
        began = time.monotonic()
        if turn > 1 and began - BEGAN + longest > arguments.seconds:
            break
        for streams in arguments.streams:
            for temperature in temperatures:
                work = Work(
                    kind.some_prompts(streams, first=turn * streams),
                    arguments.tokens or TOKENS[streams],
                    temperature,
                    1000 * turn,
                    kind.ignore_eos,
                    kind.allowed_token_ids,
                )
                names = [name for name in engines if streams <= _most_streams(name[0])]
                first = turn % len(names)  # nobody is always the first
                runs = {name: engines[name].run(work) for name in [*names[first:], *names[:first]]}
                if turn:
                    where = {"kind": kind.name, "streams": streams, "temperature": temperature, "turn": turn}
                    rows += [where | _row(name, run, runs) for name, run in runs.items()]
                _say(f"{kind.name}, {streams} at once, T={temperature:g}, round {turn}")
        longest = max(longest, time.monotonic() - began)
    return rows


def _engines(kind: Kind, arguments: argparse.Namespace) -> dict[tuple[str, str], Measured]:
    """By system and proposer."""
    proposers = [name for name in kind.proposers if name in (arguments.proposers or kind.proposers)]
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    engines: dict[tuple[str, str], Measured] = {}
    for proposer in ("off", *proposers):
        _say(f"{OURS}, {proposer}")
        engines[OURS, proposer] = Ours(kind, proposer, clock, threads=arguments.threads, num_kv_blocks=1536)
    for peer in arguments.peers:
        system, _, python = peer.partition("=")
        for proposer in ("off", *(name for name in PEERS_TAKE[system][0] if name in proposers)):
            _say(f"{system}, {proposer}")
            environment = {**os.environ, **ENVIRONMENT}
            path = Path(python).absolute()  # a link into an environment: not resolved
            engines[system, proposer] = Peer(path, system, kind, proposer, environment)
    return engines


def _most_streams(system: str) -> int:
    return PEERS_TAKE[system][1] if system in PEERS_TAKE else max(TOKENS)


def _row(name: tuple[str, str], run: Run, runs: dict[tuple[str, str], Run]) -> dict[str, Any]:
    """With what it is compared to: the same system without drafts."""
    system, proposer = name
    off = runs[system, "off"]
    row = dataclasses.asdict(run)
    del row["output"]
    return {
        "system": system,
        "proposer": proposer,
        **row,
        "off_rate": off.tokens / off.seconds,
        "off_all_seconds": off.all_seconds,
        "same": run.output == off.output,
    }


def _limits(limits: Limits) -> str:
    return f"matmul {limits.matmul_flops / 1e9:.0f} GFLOP/s, read {limits.read_bytes / 1e9:.1f} GB/s"


def _shown_flags(words: list[str]) -> list[str]:
    """Without the folders of this machine."""
    return [word.rpartition("=")[0] + "=python" if "=" in word else word for word in words]


def _say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:4.0f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
