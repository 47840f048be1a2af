"""What a process that computes prompts on one core does to one that decodes on the other: `python -m
bench.beside_prefill`.

Two engines and nothing else: no gateway, no queue, no transfer of KV. So whatever 1P1D adds to this between
tokens is our servers', and this is the machine's. Four sequences of 128 tokens decode, anew for each turn, so
that all turns have the same contexts; calm turns and those beside prompts of 2,048 alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import torch

from bench.engine import BODY
from common.commands.bench.report import percentile
from common.engine import Engine, SamplingParams

TOKENS = 100  # of each sequence in a turn


def engine_on(core: int) -> Engine:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    engine = Engine.load(str(BODY), dtype="bfloat16", load_format="dummy", num_kv_blocks=1024, threads=1)
    engine.warm_up()
    return engine


def add(engine: Engine, name: str, prompt: int, output: int) -> None:
    ids = random.choices(range(3, 30_000), k=prompt)
    engine.add_prompt(name, ids, SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0))


def compute_prompts(core: int, ready: Event, wanted: Event) -> None:
    """Until ended, while `wanted`."""
    engine = engine_on(core)
    ready.set()
    while True:
        wanted.wait()
        if not engine.has_work:
            add(engine, "prompt", 2048, 1)
        engine.step()


def gaps_s(engine: Engine) -> list[float]:
    """Between the tokens of four sequences that decode together."""
    for number in range(4):
        add(engine, f"chat-{number}", 128, TOKENS)
    times = []
    while engine.has_work:
        if len(engine.step()) == 4:
            times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


@contextlib.contextmanager
def prefill_on(core: int) -> Iterator[Event]:
    context = multiprocessing.get_context("spawn")
    ready, wanted = context.Event(), context.Event()
    process = context.Process(target=compute_prompts, args=(core, ready, wanted), daemon=True)
    process.start()
    try:
        ready.wait()
        yield wanted
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    first, second, *_ = sorted(os.sched_getaffinity(0))
    with prefill_on(first) as wanted:
        engine = engine_on(second)
        gaps: dict[str, list[float]] = {"calm": [], "beside prompts": []}
        for _ in range(arguments.rounds):
            for name, of_it in gaps.items():
                wanted.set() if name != "calm" else wanted.clear()
                time.sleep(2.0)  # the step under way ends, or begins
                of_it += gaps_s(engine)
    for name, of_it in gaps.items():
        of_it.sort()
        shown = ", ".join(f"p{percent} {percentile(of_it, percent) * 1e3:.1f}" for percent in (50, 90, 99))
        print(f"{name:15} {shown} ms")


if __name__ == "__main__":
    main()
