"""The loads, and what physics allows for each: gpu-engine.md's figures, by the rates of this run.

A floor counts each weight once and each sequence's keys and values once, at the rate of a copy; for prompts,
all products at the rate of a large one. Activations are left out of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.engine import prompt_ids
from bench.gpu.limits import DeviceLimits
from common.engine import Engine, SamplingParams
from common.model_folder.model_config import ModelConfig


def decode(engine: Engine, limits: DeviceLimits, batch: int, context: int, steps: int) -> dict[str, Any]:
    """A step in which `batch` sequences decode, of about `context` tokens each: the median of `steps`."""
    times = _step_times(
        engine, batch, context, SamplingParams(max_tokens=steps + 16, temperature=0.0, ignore_eos=True)
    )
    step = statistics.median(times)
    floor = decode_bytes(engine, batch, context + steps // 2) / limits.copy_bytes
    return {
        "step_ms": step * 1e3,
        "best_step_ms": min(times) * 1e3,
        "tokens_per_s": batch / step,
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / step,
    }


def prefill(engine: Engine, limits: DeviceLimits, prompt: int, tries: int) -> dict[str, Any]:
    """To the first token of a fresh prompt, the median of `tries`."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    seconds = []
    for attempt in range(tries + 1):
        engine.add_prompt(f"prefill-{attempt}", prompt_ids(engine, prompt, seed=500 + attempt), params)
        begun = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[1:])
    floor = prefill_flops(engine.runner.config, prompt) / limits.matmul_flops
    return {
        "first_token_ms": median * 1e3,
        "tokens_per_s": prompt / median,
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / median,
    }


def throughput(engine: Engine, requests: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Requests that arrive at once, to the last one's end."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    begun = time.perf_counter()
    for index in range(requests):
        engine.add_prompt(f"request-{index}", prompt_ids(engine, prompt, seed=9000 + index), params)
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "output_tokens_per_s": requests * tokens / seconds,
        "all_tokens_per_s": requests * (prompt + tokens) / seconds,
    }


def sampling_cost(engine: Engine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """What top-p and penalties on every row add to a greedy step, as a share of it."""
    greedy = SamplingParams(max_tokens=steps + 16, temperature=0.0, ignore_eos=True)
    rich = SamplingParams(
        max_tokens=steps + 16,
        temperature=0.8,
        top_p=0.95,
        presence_penalty=0.2,
        frequency_penalty=0.2,
        seed=1,
        ignore_eos=True,
    )
    plain, sampled = (
        statistics.median(_step_times(engine, batch, context, params)) for params in (greedy, rich)
    )
    return {"greedy_ms": plain * 1e3, "sampled_ms": sampled * 1e3, "added_share": sampled / plain - 1}


def idle_share(engine: Engine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """How much of the time of decode steps no kernel runs, by the profiler's account of the device."""
    params = SamplingParams(max_tokens=steps + 32, temperature=0.0, ignore_eos=True)
    _start(engine, batch, context, params)
    for _ in range(8):
        engine.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    while engine.has_work:
        engine.step()
    whole = max(end for _, end in spans) - spans[0][0]
    busy = covered(spans)
    return {"idle_share": 1 - busy / whole, "profiled_ms": whole / 1e3, "kernels": len(spans)}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The time within at least one of these (start, end), which ascend by their starts."""
    time_covered, until = 0.0, -math.inf
    for start, end in spans:
        time_covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return time_covered


def pool_share(engine: Engine) -> dict[str, Any]:
    """How much of the card's memory, less the weights, the KV pool has."""
    total = torch.cuda.get_device_properties(engine.runner.device.torch_device).total_memory
    weights = engine.runner.config.num_parameters * engine.runner.backend.dtype.itemsize
    pool = engine.facts.num_blocks * engine.facts.layout.slab_bytes
    return {"pool_gb": pool / 1e9, "weights_gb": weights / 1e9, "share": pool / (total - weights)}


def decode_bytes(engine: Engine, batch: int, context: int) -> int:
    config = engine.runner.config
    size = engine.runner.backend.dtype.itemsize
    keys_and_values = engine.facts.layout.slab_bytes // engine.facts.layout.block_size
    return config.num_linear_parameters * size + batch * context * keys_and_values


def prefill_flops(config: ModelConfig, prompt: int) -> int:
    """Two for each multiplication: of every layer's weights with every token, of the head's with one, and of
    queries and values with what they see."""
    head = config.vocab_size * config.hidden_size
    layers = 2 * (config.num_linear_parameters - head) * prompt
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * prompt * (prompt + 1) // 2
    return layers + 2 * head + attention


def _start(engine: Engine, batch: int, context: int, params: SamplingParams) -> None:
    """Until every sequence has decoded a token."""
    for index in range(batch):
        engine.add_prompt(f"decode-{index}", prompt_ids(engine, context, seed=index), params)
    seen = 0
    while seen < batch:
        seen += sum(output.position > context for output in engine.step())


def _step_times(engine: Engine, batch: int, context: int, params: SamplingParams) -> list[float]:
    _start(engine, batch, context, params)
    times = []
    last = time.perf_counter()
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        if len(outputs) == batch:
            times.append(now - last)
        last = now
    return times[4:] or times
