"""Where a step's time goes on the CPU, part by part, beside what is possible: `python -m bench.profile`.

Parts are timed at their calls, in the engine as it serves: products by their shape, the kernels between them,
sampling, what else the runner does, and the core (planning, bookkeeping, Python). A limit is the larger of
the bytes that a part has to read at the rate at which memory was read, and its operations at the rate of a
large product, both measured before. `mixed` is the work of `bench.serving`: prompts arrive at once and are
computed while others generate; its steps are added up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.engine import BODY, prompt_ids
from bench.limits import Limits, measure_limits
from common.engine import Engine, SamplingParams
from common.engine.devices.cpu import attention, kernels, products
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.sampler import Sampler

NORMS = ("rms_norm", "add_rms_norm", "silu_mul", "rotate_and_store")
ATTENTION = "kernel attend"
CORE, REST = "core: plan, commit, Python", "runner: laying out, checks, Python between calls"


class Clock:
    """Time and calls of each part since it was last cleared."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()  # of products

    def clear(self) -> None:
        for counter in (self.seconds, self.calls, self.rows):
            counter.clear()

    def add(self, other: Clock) -> None:
        self.seconds.update(other.seconds)
        self.calls.update(other.calls)
        self.rows.update(other.rows)

    def timed(self, name: Callable[..., str], run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def timing(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*arguments, **named)
            finally:
                part = name(*arguments)
                self.seconds[part] += time.perf_counter() - start
                self.calls[part] += 1

        return timing


def shapes(engine: Engine) -> dict[str, tuple[int, int]]:
    """Columns that each product takes and gives."""
    config = engine.runner.config
    return {
        "product qkv": (config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
        "product output": (config.num_heads * config.head_dim, config.hidden_size),
        "product gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "product down": (config.intermediate_size, config.hidden_size),
        "product head": (config.hidden_size, config.vocab_size),
    }


@contextlib.contextmanager
def watching(engine: Engine) -> Iterator[Clock]:
    """Time the parts of an engine's steps."""
    clock = Clock()
    names = {shape: part for part, shape in shapes(engine).items()}

    def product(linear: Any, x: torch.Tensor) -> str:
        part = names[linear.in_features, linear.out_features]
        clock.rows[part] += x.shape[0]
        return part

    with contextlib.ExitStack() as stack:

        def watch(owner: Any, method: str, name: Callable[..., str]) -> None:
            before = getattr(owner, method)
            setattr(owner, method, clock.timed(name, before))
            stack.callback(setattr, owner, method, before)

        for linear in (products._Packed, products._ByRows, products._OneDnn, products._Plain):
            watch(linear, "product", product)
        for kernel in NORMS:
            watch(kernels, kernel, lambda *_, kernel=kernel: f"kernel {kernel}")
        watch(attention, "attend", lambda *_: ATTENTION)
        for method in ("sample", "accept"):
            watch(Sampler, method, lambda *_: "sampling")
        watch(ModelRunner, "run", lambda *_: "run")
        yield clock


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one kind of step: seconds and calls of each part in a step, and what the limits allow."""

    name: str
    steps: int
    step_s: float
    parts: dict[str, dict[str, float]]


def product_limit(engine: Engine, part: str, rows: float, calls: float, limits: Limits) -> float:
    """Seconds that products of this shape take at least, all `calls` of a step with `rows` in all."""
    width, columns = shapes(engine)[part]
    size, config = width * columns, engine.runner.config
    layers = 1 if part == "product head" else config.num_layers
    once = min(calls, layers)  # a weight is read once where its calls follow each other
    read = once * size * engine.runner.backend.dtype.itemsize / limits.read_bytes
    return max(read, 2.0 * size * rows / limits.matmul_flops)


def kv_bytes(engine: Engine, positions: int) -> int:
    return positions * engine.layout.without_draft.bytes_per_token


def summed(
    engine: Engine, name: str, clock: Clock, steps: list[float], limits: Limits, attention_s: float
) -> Profile:
    count = len(steps)
    parts: dict[str, dict[str, float]] = {}
    inside = 0.0
    for part, seconds in clock.seconds.most_common():
        if part == "run":
            continue
        inside += seconds
        calls = clock.calls[part] / count
        row = parts[part] = {"seconds": seconds / count, "calls": calls}
        if part.startswith("product "):
            row["limit_s"] = product_limit(engine, part, clock.rows[part] / count, calls, limits)
        elif part == ATTENTION:
            row["limit_s"] = attention_s
    parts[REST] = {"seconds": (clock.seconds["run"] - inside) / count}
    parts[CORE] = {"seconds": (sum(steps) - clock.seconds["run"]) / count}
    return Profile(name, count, sum(steps) / count, parts)


def decode(engine: Engine, clock: Clock, limits: Limits, batch: int, context: int, tokens: int) -> Profile:
    """Steps that generate a token for each of `batch` sequences of about `context` positions."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for index in range(batch):
        engine.add_prompt(f"decode-{index}", prompt_ids(engine, context, seed=index), params)
    steps: list[float] = []
    full = Clock()
    while engine.has_work:
        clock.clear()
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if len(outputs) == batch and all(output.position > context for output in outputs):
            steps.append(seconds)
            full.add(clock)
    attention_s = kv_bytes(engine, batch * (context + tokens // 2)) / limits.read_bytes
    return summed(engine, f"decode, {batch} rows after {context}", full, steps, limits, attention_s)


def prefill(engine: Engine, clock: Clock, limits: Limits, prompt: int, tries: int) -> Profile:
    """A whole fresh prompt, as one."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    runs: list[float] = []
    for index in range(tries + 1):
        if index == 1:
            clock.clear()  # the first one warms up
        engine.add_prompt(f"prefill-{index}", prompt_ids(engine, prompt, seed=1000 + index), params)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        if index:
            runs.append(time.perf_counter() - start)
    config = engine.runner.config
    width = config.num_heads * config.head_dim * config.num_layers
    flops = 2.0 * prompt * prompt * width  # two products, half of the square
    return summed(engine, f"prompt of {prompt}", clock, runs, limits, flops / limits.matmul_flops)


def mixed(
    engine: Engine, clock: Clock, limits: Limits, requests: int, prompt: int, tokens: int
) -> list[Profile]:
    """`requests` prompts at once and their replies: steps with prompts only, with both, without prompts."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    clocks: dict[str, Clock] = defaultdict(Clock)
    steps: dict[str, list[float]] = defaultdict(list)
    for index in range(requests):
        engine.add_prompt(f"mixed-{index}", prompt_ids(engine, prompt, seed=5000 + index), params)
    scheduler = engine.scheduler
    while engine.has_work:
        clock.clear()
        computed = {s.sequence_id: s.num_computed for s in scheduler.running}
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        goes_on = any(o.position > prompt for o in outputs)
        has_prompt = any(
            s.num_computed <= prompt and s.num_computed > computed.get(s.sequence_id, 0)
            for s in scheduler.running
        )
        kind = "both" if goes_on and has_prompt else "prompts" if has_prompt else "replies"
        steps[kind].append(seconds)
        clocks[kind].add(clock)
    name = f"{requests} x {prompt}/{tokens}: steps of"
    return [summed(engine, f"{name} {kind}", clocks[kind], of, limits, 0.0) for kind, of in steps.items()]


def shown(profile: Profile) -> str:
    lines = [f"{profile.name}: {profile.steps} of {profile.step_s * 1e3:.2f} ms"]
    for part, row in sorted(profile.parts.items(), key=lambda item: -item[1]["seconds"]):
        limit = row.get("limit_s", 0.0)
        lines.append(
            f"  {part:50} {row['seconds'] * 1e3:9.3f} ms {row['seconds'] / profile.step_s:6.1%}"
            + (f" {row['calls']:7.0f} calls" if "calls" in row else " " * 14)
            + (f"   {limit / row['seconds']:5.2f} of the limit" if limit else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(BODY), help="folder of a checkpoint or a config")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64], help="of decode steps")
    parser.add_argument("--context", type=int, default=256, help="positions before a decode step")
    parser.add_argument("--prompts", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--no-mixed", action="store_true")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    limits = measure_limits()
    engine = Engine.load(
        arguments.model,
        dtype="bfloat16",
        threads=arguments.threads,
        device="cpu",
        load_format=arguments.load_format,
        num_kv_blocks=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )
    engine.warm_up()
    profiles: list[Profile] = []
    with watching(engine) as clock:
        for rows in arguments.rows:
            profiles.append(decode(engine, clock, limits, rows, arguments.context, 24 + 2 * rows))
        for prompt in arguments.prompts:
            profiles.append(prefill(engine, clock, limits, prompt, 3))
        if not arguments.no_mixed:
            profiles += mixed(engine, clock, limits, 16, 256, 64)
    after = measure_limits()
    said = [
        f"matmul {one.matmul_flops / 1e9:.0f} GFLOP/s, read {one.read_bytes / 1e9:.1f} GB/s"
        for one in (limits, after)
    ]
    print(engine.runner.backend.numerics_class)
    print(f"limits before: {said[0]}; after: {said[1]}")
    for profile in profiles:
        print("\n" + shown(profile))
    if arguments.json:
        report = {
            "numerics_class": engine.runner.backend.numerics_class,
            "cores": os.cpu_count(),
            "limits": said,
            "profiles": [dataclasses.asdict(profile) for profile in profiles],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
