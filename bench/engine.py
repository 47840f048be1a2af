"""The bare engine, in process, against the machine's limits: `python -m bench.engine`.

Decode moves every weight once a step, so at batch 1 it is bounded by memory bandwidth; prefill is
bounded by the matmul peak. Weights are random: only the cost is real. Prints a table, and writes
it as JSON with `--json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.limits import Limits, measure_limits
from common.engine import Engine, SamplingParams

BODY = Path(__file__).parent / "models" / "llama-454m"


def run_decode(engine: Engine, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds of a decode step with `batch` sequences, median over `tokens` steps."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for index in range(batch):
        engine.add_prompt(f"decode-{index}", prompt_ids(engine, prompt, seed=index), params)
    seconds = []
    while engine.has_work:
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch and outputs[0].position > prompt:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"step_s": median, "best_step_s": min(seconds), "tokens_per_s": batch / median}


def run_prefill(engine: Engine, prompt: int, tries: int) -> dict[str, float]:
    """Seconds to the first token of a fresh prompt, median of `tries`."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    seconds = []
    for index in range(tries + 1):
        engine.add_prompt(f"prefill-{index}", prompt_ids(engine, prompt, seed=1000 + index), params)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {"first_token_s": median, "tokens_per_s": prompt / median}


def prompt_ids(engine: Engine, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, engine.runner.config.vocab_size, (length,), generator=generator).tolist()


def measure(engine: Engine, limits: Limits, quick: bool) -> dict[str, Any]:
    weights = engine.runner.config.num_linear_parameters
    weight_bytes = weights * engine.runner.backend.dtype.itemsize
    results: dict[str, Any] = {}
    for batch in (1, 16, 32):
        result = run_decode(engine, batch, prompt=128, tokens=16 if quick else 64)
        result["share_of_bandwidth"] = weight_bytes / result["step_s"] / limits.read_bytes
        results[f"decode, batch {batch}"] = result
    for prompt in (256, 2048):
        result = run_prefill(engine, prompt, tries=2 if quick else 5)
        flops = 2 * weights * result["tokens_per_s"]  # attention not counted
        result["share_of_matmul_peak"] = flops / limits.matmul_flops
        results[f"prefill, {prompt} tokens"] = result
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BODY), help="folder of a checkpoint or config")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    before = measure_limits()
    engine = Engine.load(
        arguments.model,
        dtype=arguments.dtype,
        threads=arguments.threads,
        device="cpu",
        load_format=arguments.load_format,
        num_kv_blocks=1024,
        enable_prefix_caching=False,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )
    engine.warm_up()
    results = measure(engine, before, arguments.quick)
    after = measure_limits()
    report = {
        "numerics_class": engine.runner.backend.numerics_class,
        "parameters": engine.runner.config.num_parameters,
        "matmul_gflops": [before.matmul_flops / 1e9, after.matmul_flops / 1e9],
        "read_gb_per_s": [before.read_bytes / 1e9, after.read_bytes / 1e9],
        "results": results,
    }
    print(report["numerics_class"])
    print(
        f"limits before and after: matmul {report['matmul_gflops'][0]:.0f} and "
        f"{report['matmul_gflops'][1]:.0f} GFLOP/s, read {report['read_gb_per_s'][0]:.1f} and "
        f"{report['read_gb_per_s'][1]:.1f} GB/s"
    )
    for name, result in results.items():
        share = next(value for key, value in result.items() if key.startswith("share"))
        seconds = result.get("step_s", result.get("first_token_s"))
        print(
            f"{name:22} {result['tokens_per_s']:8.1f} tok/s {seconds * 1e3:9.1f} ms {share:5.2f} of the limit"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
