"""What sampling costs per step on this machine: milliseconds, and times one pass over the logits.

    python bench/sampler.py [--rows 64] [--vocab 151936] [--repeats 15] [--threads N]

`peaked` logits have a most likely token of probability about 0.5 and a Zipf-like tail, shuffled
over the vocabulary, as a trained model's have; `flat` ones are nearly uniform (standard deviation
0.1). The pass is `logits.sum(-1)`, timed between the cases of the same run. Repeats alternate
between two sets of logits larger together than the last-level cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from common.engine.devices.cpu.numba_runtime import set_num_threads
from common.engine.devices.cpu.sampling import NumbaSampling
from common.engine.runner.sampler import Sampler
from common.engine.sampling.records import SampleRows
from common.sampling import SamplingParams

WARM = SamplingParams(temperature=0.8)
CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 0.8": WARM,
    "+ top_p 0.95": dataclasses.replace(WARM, top_p=0.95),
    "+ top_k 50": dataclasses.replace(WARM, top_k=50),
    "+ top_k 50, top_p 0.95": dataclasses.replace(WARM, top_k=50, top_p=0.95),
    "+ min_p 0.05": dataclasses.replace(WARM, min_p=0.05),
    "+ penalties": dataclasses.replace(
        WARM, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "+ logprobs 5": dataclasses.replace(WARM, logprobs=5),
}
PROMPT = 1000  # tokens, for the penalties


def peaked(rows: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    """Zipf with exponent 1.1 and noise; the first token lifted to half of the mass."""
    ranks = torch.arange(1, vocab + 1, dtype=torch.float32)
    logits = -1.1 * ranks.log() + 0.5 * torch.randn(rows, vocab, generator=generator)
    logits[:, 0] = logits[:, 1:].logsumexp(-1)
    shuffled = torch.stack([row[torch.randperm(vocab, generator=generator)] for row in logits])
    return shuffled + 12.0


def flat(rows: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    return 0.1 * torch.randn(rows, vocab, generator=generator)


def measured(call: Callable[[int], object], repeats: int) -> tuple[float, float, float]:
    """Milliseconds: (median, least) of the clock, and least processor time of all threads.

    On a shared machine the clock also counts waiting for a core; the processor time does not,
    but counts threads that spin at the end of a parallel loop: for it, use one thread.
    """
    call(0)
    times, busy = [], []
    for repeat in range(repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        call(repeat)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return 1e3 * statistics.median(times), 1e3 * min(times), 1e3 * min(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    set_num_threads(options.threads)
    torch.set_num_threads(options.threads)  # after numba's, which sets OpenMP's count at its start
    rows, vocab = options.rows, options.vocab
    generator = torch.Generator().manual_seed(0)
    numbers = np.random.default_rng(0)

    print(
        f"{rows} rows x {vocab} tokens, {torch.get_num_threads()} threads, "
        f"{options.repeats} repeats; x = cpu over cpu of logits.sum(-1)\n"
    )
    print(
        f"{'logits':<8}{'dtype':<10}{'parameters':<26}{'median ms':>10}{'least ms':>10}{'cpu ms':>9}{'x':>6}"
    )
    for shape in (peaked, flat):
        floats = [shape(rows, vocab, generator) for _ in range(2)]
        for dtype in (torch.float32, torch.bfloat16):
            logits = [each.to(dtype) for each in floats]
            for name, params in CASES.items():
                sampler = Sampler(vocab, rows, NumbaSampling(vocab))
                for slot in range(rows):
                    prompt = numbers.integers(0, vocab, PROMPT).tolist()
                    seeded = dataclasses.replace(params, seed=slot)
                    sampler.add(slot, seeded, 0, (), prompt)
                where = SampleRows(np.arange(rows), np.full(rows, PROMPT))
                _, _, one_pass = measured(lambda i, x=logits: x[i % 2].sum(-1), options.repeats)
                median, least, busy = measured(
                    lambda i, x=logits, s=sampler, w=where: s.sample(x[i % 2], w), options.repeats
                )
                print(
                    f"{shape.__name__:<8}{str(dtype)[6:]:<10}{name:<26}{median:>10.2f}{least:>10.2f}{busy:>9.2f}"
                    f"{busy / one_pass:>6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
