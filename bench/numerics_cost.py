"""What the numerics rule costs with oneDNN's products: `python -m bench.numerics_cost`. Our own cost nothing.

Without it, all rows of a step go through each product in one call of whatever size, as elsewhere.
The two take turns, case by case, so that a drift of the machine hits both; the ratio is what
counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator

import torch

from bench.engine import BODY, run_decode, run_prefill
from common.engine import Engine
from common.engine.devices.cpu import backend
from common.engine.devices.cpu.products import OneDnnProducts
from common.engine.devices.rows import RowPlan


@dataclasses.dataclass(frozen=True, slots=True)
class FreeRowPlan(RowPlan):
    """Every product in one call, no padding: bits depend on the batch."""

    def slices(self, rows: int, padded_generated: int) -> Iterator[slice]:
        yield slice(0, rows)

    def padded_generated(self, rows: int) -> int:
        return rows

    def padded_prompt(self, rows: int) -> int:
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BODY))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    backend._fastest = OneDnnProducts  # on any machine
    engine = Engine.load(
        arguments.model,
        dtype=arguments.dtype,
        threads=arguments.threads,
        device="cpu",
        load_format="dummy",
        num_kv_blocks=1024,
        enable_prefix_caching=False,
    )
    engine.warm_up()
    ruled = engine.runner.backend.row_plan
    free = FreeRowPlan(ruled.prompt_rows, ruled.generated_rows, ruled.generated_multiple, ruled.query_tile)
    cases = {
        **{f"decode, batch {n}": ("decode", n) for n in (1, 3, 16, 32, 48)},
        **{f"prefill, {n} tokens": ("prefill", n) for n in (16, 100, 256, 1000, 2048)},
    }
    print(engine.runner.backend.numerics_class)
    print(f"{'case':22} {'with the rule':>14} {'without':>10} {'time ratio':>11}")
    for name, (kind, size) in cases.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(arguments.rounds):
            for rule in (True, False):
                engine.runner.backend.row_plan = ruled if rule else free
                if kind == "decode":
                    seconds[rule].append(run_decode(engine, size, prompt=64, tokens=24)["step_s"])
                else:
                    seconds[rule].append(run_prefill(engine, size, tries=2)["first_token_s"])
        ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
        print(
            f"{name:22} {statistics.median(seconds[True]) * 1e3:11.1f} ms "
            f"{statistics.median(seconds[False]) * 1e3:7.1f} ms {statistics.median(ratios):11.2f}"
        )


if __name__ == "__main__":
    main()
