"""What one step costs the scheduler, without a model: `python -m bench.scheduler`.

Processor time of `schedule()` and `postprocess()` together, median over steps, with all sequences
decoding; with drafts, 2 of 3 are accepted. Processor time, because nothing here waits.
"""

from __future__ import annotations

import argparse
import statistics
import time

from common.engine.core.block_pool import BlockPool
from common.engine.core.scheduler import Scheduler
from common.engine.core.sequence import Sequence
from common.sampling import SamplingParams


def measure(sequences: int, drafts: int, steps: int) -> tuple[float, float]:
    """Milliseconds of (schedule, postprocess)."""
    pool = BlockPool(sequences * 64, 16)
    scheduler = Scheduler(
        pool, max_num_seqs=sequences, max_num_batched_tokens=sequences * (drafts + 300), max_model_len=4096
    )
    params = SamplingParams(max_tokens=700)
    for number in range(sequences):
        prompt = [number + 1] * 200
        scheduler.add(Sequence(number, f"r{number}", 0, 200, prompt, params, arrival=number))
    planning, ending = [], []
    for _ in range(steps):
        for sequence in scheduler.running:
            sequence.draft_token_ids = [7] * drafts
        begun = time.process_time()
        step = scheduler.schedule()
        planned = time.process_time()
        accepted = {
            chunk.sequence.sequence_id: [7] * max(1, chunk.num_drafted)
            for chunk in step.chunks
            if chunk.samples
        }
        between = time.process_time()
        scheduler.postprocess(step, accepted)
        ending.append(time.process_time() - between)
        planning.append(planned - begun)
    return statistics.median(planning[5:]) * 1e3, statistics.median(ending[5:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    for sequences in (64, 256):
        for drafts in (0, 3):
            planning, ending = measure(sequences, drafts, arguments.steps)
            print(
                f"{sequences:4} sequences, {drafts} drafts: schedule {planning:.2f} ms, "
                f"postprocess {ending:.2f} ms, together {planning + ending:.2f} ms"
            )


if __name__ == "__main__":
    main()
