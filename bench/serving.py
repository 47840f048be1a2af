"""The unified system over HTTP against the bare engine on the same cores: `python -m bench.serving`.

The same closed-loop load (16 open requests, fresh prompts of 256 random tokens, 64 out) goes to the
engine in this process and, through gateway, queue and node, to `pdq serve --unified 1`; the two take
turns while the other idles. Also measured: what idle processes cost, and what memory they hold.
Weights are random: only the cost is real.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.engine import BODY, prompt_ids
from bench.served import served
from common.engine import Engine, SamplingParams
from common.model_files import SHIPPED_MODEL

PROMPT, OUTPUT, OPEN = 256, 64, 16


def model_folder(folder: Path) -> Path:
    """The 0.5B body's config with some tokenizer: prompts are ids, the text does not matter."""
    shutil.copy(BODY / "config.json", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_MODEL / name, folder)
    return folder


def over_http(port: int, requests: int, seed: int) -> dict[str, Any]:
    """What `pdq bench` reports for one round."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable,
            "-m",
            "common.cli",
            "bench",
            "--url",
            f"http://127.0.0.1:{port}",
            "--concurrency",
            str(OPEN),
            "--requests",
            str(requests),
            "--warmup",
            "0",
            "--prompt-len",
            str(PROMPT),
            "--output-len",
            str(OUTPUT),
            "--ignore-eos",
            "--vocab-size",
            "2000",
            "--seed",
            str(seed),
            "--json",
            report.name,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(Path(report.name).read_text())
        return result


def bare(engine: Engine, requests: int, seed: int) -> float:
    """Output tokens per second of the same load without HTTP, queue and second process."""
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    names = itertools.count()
    tokens = waiting = 0

    def add() -> None:
        number = next(names)
        if number < requests:
            engine.add_prompt(f"{seed}-{number}", prompt_ids(engine, PROMPT, seed * 10_000 + number), params)

    start = time.perf_counter()
    for _ in range(OPEN):
        add()
    while engine.has_work:
        for output in engine.step():
            tokens += len(output.token_ids)
            waiting += output.finish_reason is not None
        while waiting:
            waiting -= 1
            add()
    return tokens / (time.perf_counter() - start)


def idle_shares(parent: psutil.Process, seconds: float) -> dict[str, float]:
    """Share of a core that each process of the system takes while nothing is asked of it."""
    processes = [parent, *parent.children(recursive=True)]
    before = {process.pid: sum(process.cpu_times()[:2]) for process in processes}
    time.sleep(seconds)
    return {
        label(process): (sum(process.cpu_times()[:2]) - before[process.pid]) / seconds
        for process in processes
    }


def label(process: psutil.Process) -> str:
    command = process.cmdline()
    for name in ("gateway", "common.node", "common.cli"):
        if name in command:
            return {"common.node": "node", "common.cli": "pdq serve"}.get(name, name)
    return Path(command[0]).name


def memory(parent: psutil.Process) -> dict[str, float]:
    """Proportional set size of each process, MB."""
    processes = [parent, *parent.children(recursive=True)]
    return {label(process): process.memory_full_info().pss / 1e6 for process in processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8155)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = {"dtype": "bfloat16", "load_format": "dummy", "num_kv_blocks": 1024}
    flags = ["--dtype", "bfloat16", "--load-format", "dummy", "--num-kv-blocks", "1024"]
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name))
        engine = Engine.load(folder, threads=arguments.threads, **shared)
        engine.warm_up()
        with served(arguments.port, ["--model", str(folder), *flags]) as system:
            idle = idle_shares(system, 10.0)
            rounds = []
            for number in range(arguments.rounds + 1):
                alone = bare(engine, arguments.requests, number)
                report = over_http(arguments.port, arguments.requests, number)
                if number:  # the first one warms up
                    rounds.append((report["summary"]["output_tokens_per_s"], alone))
            held = memory(system)
        pool = 1024 * engine.layout.slab_bytes / 1e6
    weights = engine.runner.config.num_parameters * 2 / 1e6
    ratios = [http / alone for http, alone in rounds]
    print(f"{engine.runner.backend.numerics_class}; {OPEN} open, {PROMPT} in, {OUTPUT} out, fresh prompts")
    for http, alone in rounds:
        print(f"over HTTP {http:7.1f} tok/s   bare {alone:7.1f} tok/s   ratio {http / alone:.3f}")
    print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.3f}")
    print("idle, share of a core: " + ", ".join(f"{k} {v:.2%}" for k, v in idle.items()))
    print("memory after load, PSS: " + ", ".join(f"{k} {v:.0f} MB" for k, v in held.items()))
    print(f"of the node: weights {weights:.0f} MB, pool {pool:.0f} MB")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rounds": rounds, "idle": idle, "memory_mb": held}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
