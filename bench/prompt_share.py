"""What it costs to cut prompts so that others decode in time: `python -m bench.prompt_share`.

Without HTTP, for each of some targets for the time between tokens (0: prompts are not cut):

    batch   16 requests at once, 256 tokens in, 64 out each
    burst   a prompt of 2,048 beside four sequences that decode
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from bench.engine import BODY
from common.engine import Engine, SamplingParams
from common.engine.core.output import StepOutput
from common.engine.core.step import Step
from common.engine.interface import StepResult
from common.engine.runner.model_runner import ModelRunner
from common.settings.config import EngineSettings

IDS = range(3, 30_000)


class Timed(Engine):
    """Keeps the seconds of each step."""

    times: list[float]

    def commit(self, step: Step, result: StepResult) -> list[StepOutput]:
        self.times.append(result.seconds)
        return super().commit(step, result)


def started(target_s: float) -> Timed:
    settings = EngineSettings(
        model=str(BODY), dtype="bfloat16", load_format="dummy", num_kv_blocks=1024, target_itl_s=target_s
    )
    engine = Timed(settings, ModelRunner(settings))
    engine.times = []
    engine.warm_up()
    return engine


def add(engine: Engine, name: str, prompt: int, output: int, rng: random.Random) -> None:
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    engine.add_prompt(name, rng.choices(IDS, k=prompt), params)


def batch(engine: Timed, rng: random.Random) -> str:
    for number in range(16):
        add(engine, f"batch-{number}", 256, 64, rng)
    began, first = time.perf_counter(), dict[str, float]()
    engine.times.clear()
    while engine.has_work:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return (
        f"{16 * 64 / seconds:5.1f} tok/s, first token {statistics.mean(first.values()):.2f} s, "
        f"{len(engine.times)} steps"
    )


def burst(engine: Timed, rng: random.Random) -> str:
    for number in range(4):
        add(engine, f"chat-{number}", 128, 1000, rng)
    while any(not sequence.is_decoding for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    add(engine, "burst", 2048, 1, rng)
    began = time.perf_counter()
    engine.times.clear()
    while not any(output.request_id == "burst" for output in engine.step()):
        pass
    seconds = time.perf_counter() - began
    for number in range(4):
        engine.abort(f"chat-{number}")
    return f"first token {seconds:.2f} s, {len(engine.times)} steps, the longest {max(engine.times):.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.0, 0.5, 0.25])
    for target_s in parser.parse_args().targets:
        engine, rng = started(target_s), random.Random(1)
        for load in (batch, burst):
            print(f"{target_s:5.2f} s  {load.__name__}: {load(engine, rng)}", flush=True)


if __name__ == "__main__":
    main()
