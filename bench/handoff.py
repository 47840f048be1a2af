"""The handoff against the limits of the same run: `make bench-handoff`.

First the transports alone (`bench/transports.py`, `bench/staging.py`). Then real processes: Redis,
a gateway, a prefill and a decode node, prompts of 2,048 tokens in chunks of 512, by each transport;
the decode node once idle, once with a stream that it decodes all the time. Per prompt:

    last chunk                its step is computed: KV and first token are there
    last chunk to adopted     the part of the handoff that computing does not hide
    adopted to first step     0 when the decode loop is idle, else what is left of the running step
    last chunk to its copy    below 0: the copy began while the step chose the first token
    last copy to adopted      the thread's result, and Commit where it is not there yet
    copied after last chunk   of that, bytes under way: the unhidden copy (with digests)
    hidden                    share of all seconds of copying that lie before the last chunk's end

The body has 24 KiB per token as a 0.5B model has, but is narrow, so that nodes on two cores need
milliseconds for a chunk; `--body` takes another (`bench/models/llama-454m`). Weights are random.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.engine import BODY
from bench.serving import model_folder
from bench.staging import PROMPTS, measure_staging
from bench.transports import measure_transports
from tests.support.deployment import Deployment, complete

PROMPT, CHUNK = 2048, 512
POOL = 400  # blocks of a node; the stream of a busy decode node may come to need 221 of them
WARM_UP = 4  # prompts that open the link and touch every block of the pools: warm pages from then on
NARROW = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
GOALS = {"shm / memcpy": 0.9, "shm, digest / memcpy": 0.75, "tcp / socket": 0.8, "tcp, digest / socket": 0.8}


def narrow_body(folder: Path) -> Path:
    """The 0.5B body, with the KV it has, and little else."""
    model_folder(folder)
    config = json.loads((BODY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **NARROW}))
    return folder


class Clocked(Deployment):
    """A deployment whose nodes write down when things happen."""

    def __init__(self, model: Path, folder: Path, transport: str) -> None:
        super().__init__(model, prefill=1, decode=1)
        self.folder, self.transport = folder, transport
        folder.mkdir(exist_ok=True)

    def start_node(self, name: str, role: str) -> None:
        self.start(
            name,
            "bench.node_clock",
            "--role",
            role,
            "--name",
            name,
            "--model",
            str(self.model),
            "--dtype",
            "bfloat16",
            "--load-format",
            "dummy",
            "--threads",
            "1",
            "--num-kv-blocks",
            str(POOL),
            "--max-num-batched-tokens",
            str(CHUNK),
            "--transports",
            self.transport,
            str(self.folder / f"{name}.jsonl"),
        )

    def notes(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in sorted(self.folder.glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]


async def ask(system: Deployment, client: httpx.AsyncClient, seed: int, **body: Any) -> None:
    prompt = random.Random(seed).choices(range(100, 2000), k=body.pop("length", PROMPT))
    await complete(
        client, system.url, model=system.model.name, prompt=prompt, ignore_eos=True, temperature=0.0, **body
    )


async def run_prompts(system: Deployment, prompts: int, busy: bool) -> None:
    async with httpx.AsyncClient(timeout=600) as client:
        stream = asyncio.create_task(ask(system, client, 1, length=32, max_tokens=3500 if busy else 1))
        await asyncio.sleep(1.0)  # until it decodes
        for seed in range(WARM_UP + prompts):
            await ask(system, client, 100 + seed, max_tokens=3)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)


def evaluate(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the prompts of full length, those that warm up left out."""
    computed = {n["request"]: n["at"] for n in notes if n["what"] == "chunk" and n["end"] == PROMPT}
    adopted = {n["request"]: n["at"] for n in notes if n["what"] == "adopted"}
    stepped = {n["request"]: n["at"] for n in notes if n["what"] == "first step"}
    pulls = sorted((n["begin"], n["at"]) for n in notes if n["what"] == "pull")
    names = sorted(computed.keys() & adopted.keys() & stepped.keys(), key=lambda r: computed[r])
    rows = []
    for before, name in itertools.pairwise(names[WARM_UP - 1 :]):
        mine = [(a, b) for a, b in pulls if adopted[before] < a and b <= adopted[name]]
        copying = sum(b - a for a, b in mine)
        late = sum(b - max(a, computed[name]) for a, b in mine if b > computed[name])
        rows.append(
            {
                "last chunk to adopted": adopted[name] - computed[name],
                "adopted to first step": stepped[name] - adopted[name],
                "last chunk to first step": stepped[name] - computed[name],
                "last chunk to its copy": max([a for a, _ in mine]) - computed[name],
                "last copy to adopted": adopted[name] - mine[-1][1],
                "copied after last chunk": late,
                "beyond the unhidden copy": stepped[name] - computed[name] - late,
                "copying": copying,
                "hidden": 1 - late / copying,
            }
        )
    return {"prompts": len(rows)} | {
        key: {"median": statistics.median(r[key] for r in rows), "best": min(r[key] for r in rows)}
        for key in rows[0]
    }


def measure_latency(model: Path, prompts: int, transports: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured, and its numbers, one after the other."""
    for transport in transports:
        for busy in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                system = Clocked(model, Path(folder), transport)
                with system:
                    asyncio.run(run_prompts(system, prompts, busy))
                    notes = system.notes()
                yield f"{transport}, decode loop {'busy' if busy else 'idle'}", evaluate(notes)


def report(results: dict[str, Any]) -> None:
    """Print what there is of the results."""
    if (staging := results.get("staging")) is not None:
        columns = "".join(f"{tokens:>9,} tokens" for tokens in PROMPTS)
        print(f"peak memory beyond the pools, MiB {columns}")
        for transport, ends in staging.items():
            for end, grown in ends.items():
                row = "".join(f"{grown[tokens] / 2**20:16.2f}" for tokens in PROMPTS)
                print(f"  {transport + ', ' + end:31} {row}")
    if (transports := results.get("transports")) is not None:
        print(f"slabs of {transports['slab_bytes']} bytes, prompts of {transports['blocks']}")
        for name, rate in transports["best_gb_per_s"].items():
            median = transports["median_gb_per_s"][name]
            print(f"  {name:24} {rate:6.2f} GB/s best {median:6.2f} median")
        for name, best in transports["share_best"].items():
            median, goal = transports["share_median"][name], GOALS.get(name, "none")
            print(f"  {name:24} {best:6.2f} of best   {median:6.2f} median of pairs   goal {goal}")
    for name, result in results.get("latency", {}).items():
        print(f"{name} ({result['prompts']} prompts of {PROMPT} tokens)")
        for key, value in result.items():
            if key == "hidden":
                print(f"  {key:26} {value['median']:8.2f} median   goal 0.7")
            elif isinstance(value, dict):
                median, best = value["median"] * 1e3, value["best"] * 1e3
                print(f"  {key:26} {median:8.2f} ms median {best:8.2f} best")
    sys.stdout.flush()  # each part as soon as it is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each transport")
    parser.add_argument("--prompts", type=int, default=12, help="per latency case")
    parser.add_argument("--body", type=Path, help="folder of another model or config")
    parser.add_argument("--only", choices=["transports", "latency"])
    parser.add_argument("--transports", nargs="*", default=["shm", "tcp"])
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    command = " ".join(["python -m bench.handoff", *sys.argv[1:]])
    results: dict[str, Any] = {"command": command, "machine": platform.platform()}
    print("#", command)
    if arguments.only != "latency":
        results["transports"] = measure_transports(rounds=arguments.rounds)
        results["staging"] = measure_staging()
        report(results)
    if arguments.only != "transports":
        results["latency"] = {}
        with tempfile.TemporaryDirectory() as folder:
            model = arguments.body or narrow_body(Path(folder))
            for name, case in measure_latency(model, arguments.prompts, arguments.transports):
                results["latency"][name] = case
                report({"latency": {name: case}})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
