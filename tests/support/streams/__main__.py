"""More of the proof than `make test` runs.

python -m tests.support.streams schedules [--seconds 60]     random ones, and how many a minute
python -m tests.support.streams mutations                    each rule taken out
"""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import multiprocessing
import os
import sys
import time

from common.child_process import die_with_parent
from tests.support.streams.mutations import MUTATIONS, noticed
from tests.support.streams.system import Schedule

PROCESSES = os.cpu_count() or 1
SCHEDULES = 1000  # of which one must notice


def run_for(seconds: float, first: int, step: int) -> int:
    """Every `step`-th seed from `first` on; how many ran."""
    deadline, count = time.perf_counter() + seconds, 0
    for seed in range(first, sys.maxsize, step):
        try:
            Schedule(seed).run()
        except Exception as error:
            raise AssertionError(f"Schedule({seed}) failed: {error!r} {error.__notes__}") from error
        count += 1
        if time.perf_counter() > deadline:
            break
    return count


def schedules(seconds: float) -> None:
    began = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        PROCESSES, fork, initializer=die_with_parent(os.getpid())
    ) as pool:
        counts = pool.map(
            run_for, *zip(*((seconds, first, PROCESSES) for first in range(PROCESSES)), strict=True)
        )
        count = sum(counts)
    took = time.perf_counter() - began
    print(f"{count} random schedules of streams in {took:.1f} s on {PROCESSES} processes")


def mutations() -> None:
    for rule in MUTATIONS:
        seed = noticed(rule, SCHEDULES)
        print(f"{rule}: {'noticed by nobody' if seed is None else f'noticed by schedule {seed}'}")
        assert seed is not None, rule


def main() -> None:
    logging.disable()
    parser = argparse.ArgumentParser(prog="python -m tests.support.streams")
    parser.add_argument("what", choices=("schedules", "mutations"))
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.what == "schedules":
        schedules(arguments.seconds)
    else:
        mutations()


if __name__ == "__main__":
    main()
