"""The engine on one GPU, against its limits: python -m bench.gpu

The most telling parts come first, each in a process of its own with a time limit, and what a part has found
is printed and kept as soon as it is known: a crash or the end of the time costs what follows, and nothing
else. All results come as one file with --json. Weights are random: only the cost is real. Runs on a host,
too (--device cpu --model a small one --quick), to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "models" / "qwen3-8b"
BUDGET_S = 450.0

Result = tuple[str, dict[str, Any]]


def engine_part(arguments: argparse.Namespace) -> Iterator[Result]:
    """Ready, then every load on one engine."""
    import torch

    from bench.gpu import cases, limits
    from common.engine import Engine

    device = torch.device(arguments.device)
    found = limits.measure(device, tries=3 if arguments.quick else 10)
    yield (
        "limits",
        {**dataclasses.asdict(found), "torch": torch.__version__, "python": platform.python_version()},
    )
    begun = time.perf_counter()
    settings: dict[str, Any] = {"num_kv_blocks": 1024} if device.type == "cpu" else {}
    engine = Engine.load(
        arguments.model, device=arguments.device, load_format="dummy", enable_prefix_caching=False, **settings
    )
    loaded = time.perf_counter()
    engine.warm_up()
    yield (
        "start",
        {
            "load_s": loaded - begun,
            "warm_up_s": time.perf_counter() - loaded,
            "numerics_class": engine.facts.fingerprint.numerics,
        },
    )
    engine.steps_ahead = 0 if engine.facts.on_host else 1
    context, steps = (32, 8) if arguments.quick else (1024, 64)
    for batch in (1, 64, 8):
        yield f"decode, batch {batch}", cases.decode(engine, found, batch, context, steps)
    yield f"prefill, {8 * context} tokens", cases.prefill(engine, found, 8 * context, tries=3)
    yield f"16 x ({context} + {context})", cases.throughput(engine, 16, context, context)
    yield "top-p and penalties, batch 64", cases.sampling_cost(engine, 64, context, steps)
    if device.type == "cuda":
        yield "pool", cases.pool_share(engine)
        yield "idle between steps, batch 64", cases.idle_share(engine, 64, context, steps)


def free_part(arguments: argparse.Namespace) -> Iterator[Result]:
    """The engine with the vendor's products, which keep no order: what the rule costs is the difference."""
    import torch

    from bench.gpu import cases, limits
    from bench.gpu.free_products import products_without_an_order
    from common.engine import Engine

    found = limits.measure(torch.device(arguments.device), tries=3)
    with products_without_an_order():
        engine = Engine.load(
            arguments.model, device=arguments.device, load_format="dummy", enable_prefix_caching=False
        )
    engine.warm_up()
    engine.steps_ahead = 1
    context, steps = (32, 8) if arguments.quick else (1024, 64)
    for batch in (1, 64):
        yield f"without an order, decode, batch {batch}", cases.decode(engine, found, batch, context, steps)
    prompt = 8 * context
    yield f"without an order, prefill, {prompt} tokens", cases.prefill(engine, found, prompt, tries=3)


def transformers_part(arguments: argparse.Namespace) -> Iterator[Result]:
    """The same requests through transformers' continuous batching, on the same weights' shapes."""
    import torch
    import transformers

    context = 32 if arguments.quick else 1024
    config = transformers.AutoConfig.from_pretrained(arguments.model)
    with torch.device(arguments.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, config.vocab_size, (16, context), generator=generator).tolist()
    wanted = transformers.GenerationConfig(
        max_new_tokens=context, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    for name, inputs in (("warm-up", prompts[:2]), (f"16 x ({context} + {context})", prompts)):
        begun = time.perf_counter()
        outputs = model.generate_batch(inputs, generation_config=wanted)
        seconds = time.perf_counter() - begun
        tokens = sum(len(output.generated_tokens) for output in outputs.values())
        yield (
            f"transformers {transformers.__version__}, {name}",
            {"seconds": seconds, "output_tokens_per_s": tokens / seconds},
        )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Result]]] = {
    "engine": engine_part,
    "free": free_part,
    "transformers": transformers_part,
}


def run_part(name: str, arguments: argparse.Namespace, within_s: float) -> Iterator[Result]:
    """What a part gives until it ends or its time does; then how it ended, where that was not well."""
    command = [sys.executable, "-m", "bench.gpu", "--part", name, "--device", arguments.device]
    command += ["--model", str(arguments.model), *(["--quick"] if arguments.quick else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        deadline = time.monotonic() + within_s
        try:
            while line := lines.get(timeout=max(0.0, deadline - time.monotonic())):
                with contextlib.suppress(json.JSONDecodeError):  # what a library prints
                    result, values = json.loads(line)
                    yield result, values
        except queue.Empty:
            yield name, {"error": f"not done after {within_s:.0f} s"}
        finally:
            process.kill()
    if process.returncode > 0:
        yield name, {"error": f"ended with {process.returncode}; see above"}


def _read(lines: Any, into: queue.SimpleQueue[str]) -> None:
    for line in lines:
        into.put(line)
    into.put("")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL), help="folder with a config.json (default: Qwen3-8B's)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="short contexts and few steps")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all parts together")
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        for result in PARTS[arguments.part](arguments):
            print(json.dumps(result), flush=True)
        return 0
    report: dict[str, Any] = {}
    deadline = time.monotonic() + arguments.budget_s
    parts = [part for part in PARTS if part != "free" or arguments.device.startswith("cuda")]
    for part in parts:
        for name, values in run_part(part, arguments, max(1.0, deadline - time.monotonic())):
            report[name] = values
            print(
                f"{name:36} " + "  ".join(f"{key} {_shown(value)}" for key, value in values.items()),
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for name, share in rule_costs(report).items():
        print(f"the rule costs {share:+.1%} of {name}")
    return int(any("error" in values for values in report.values()))


def rule_costs(report: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How much longer each load takes with an order of summation than without, as a share."""
    costs = {}
    for name, free in report.items():
        ours = report.get(load := name.removeprefix("without an order, "))
        if load != name and ours is not None:
            took = "step_ms" if "step_ms" in free else "first_token_ms"
            costs[load] = ours[took] / free[took] - 1
    return costs


def _shown(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
