"""What one step costs the scheduler, without a model: `python -m bench.scheduler`.

Processor time of `schedule()` and `postprocess()` together, median over steps, with all sequences
decoding; with drafts, 2 of 3 are accepted. Processor time, because nothing here waits. Then requests that
wait in line for 16 slots, few of them or many: all that the scheduler does for one, from `add` to its end,
and what it takes to abort one that waits.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time

from common.engine.core.block_pool import BlockPool
from common.engine.core.scheduler import Scheduler
from common.engine.core.sequence import Sequence
from common.sampling import SamplingParams

SERVED = 2_000  # requests, while the line keeps its length


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


def measure_line(waiting: int) -> tuple[float, float]:
    """Microseconds of (a request that is served, one that is aborted), while about `waiting` are in line."""
    pool = BlockPool(4096, 16)
    scheduler = Scheduler(pool, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=4096)
    params, chance, numbers = SamplingParams(max_tokens=8), random.Random(1), itertools.count()

    def add() -> None:
        number = next(numbers)
        prompt = [chance.randrange(30_000) for _ in range(64)]
        scheduler.add(Sequence(number, f"r{number}", 0, 64, prompt, params, arrival=number))

    for _ in range(waiting + scheduler.max_num_seqs):
        add()
    served, seconds = 0, 0.0
    while served < SERVED:
        begun = time.process_time()
        step = scheduler.schedule()
        accepted = {chunk.sequence.sequence_id: [7] for chunk in step.chunks if chunk.samples}
        ended = sum(d.finish_reason is not None for d in scheduler.postprocess(step, accepted))
        for _ in range(ended):
            add()
        seconds += time.process_time() - begun
        served += ended
    victims = chance.sample([sequence.request_id for sequence in scheduler.waiting], min(waiting, 10))
    begun = time.process_time()
    for request_id in victims:
        scheduler.abort(request_id)
    aborting = time.process_time() - begun
    return seconds / served * 1e6, aborting / len(victims) * 1e6


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
    for waiting in (10, 1_000, 10_000):
        serving, aborting = measure_line(waiting)
        print(f"{waiting:6} in line: {serving:4.0f} us for a request, {aborting:3.0f} us to abort one")


if __name__ == "__main__":
    main()
