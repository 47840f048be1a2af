"""More of the protocol's proof than `make test` runs.

python -m tests.support.protocol schedules [--seconds 60]     random ones, and how many a minute
python -m tests.support.protocol exhaustive [--works PM] [--faults 2] [--tries 1]
python -m tests.support.protocol mutations                    each rule taken out, in both
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import time

import pytest

from common.child_process import die_with_parent
from tests.support.protocol.model import Violation
from tests.support.protocol.mutations import MUTATIONS, Mutation
from tests.support.protocol.search import explore
from tests.support.protocol.world import FAULTS, World

PROCESSES = os.cpu_count() or 1


def run_for(seconds: float, first: int, step: int) -> int:
    """Every `step`-th seed from `first` on, under each kind of faults in turn; how many ran."""
    deadline, count = time.monotonic() + seconds, 0
    for seed in range(first, sys.maxsize, step):
        for name, faults in FAULTS.items():
            try:
                World(seed, faults).run()
            except Exception as error:
                raise AssertionError(f"World({seed}, FAULTS[{name!r}]) failed: {error}") from error
            count += 1
        if time.monotonic() > deadline:
            break
    return count


def schedules(seconds: float) -> None:
    began = time.monotonic()
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        PROCESSES, fork, initializer=die_with_parent(os.getpid())
    ) as pool:
        counts = pool.map(
            run_for, *zip(*((seconds, first, PROCESSES) for first in range(PROCESSES)), strict=True)
        )
        count = sum(counts)
    took = time.monotonic() - began
    print(
        f"{count} random schedules in {took:.1f} s on {PROCESSES} processes: "
        f"{count / took * 60:.0f} a minute, none broke a promise"
    )


def exhaustive(works: str, faults: int, tries: int, digests: bool, part: int, parts: int) -> None:
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    found = explore(
        [letter == "M" for letter in works],
        faults,
        tries=tries,
        digests=digests,
        processes=PROCESSES,
        part=part,
        parts=parts,
        say=say,
    )
    print(
        f"{works}, 3 blocks, {tries} tries, {faults} faults, part {part} of {parts}: {found.states} states, "
        f"{found.transitions} transitions, {found.ends} ends, all idle, "
        f"in {time.monotonic() - began:.0f} s"
    )


def noticed_by_schedules(mutation: Mutation) -> str:
    faults = FAULTS[mutation.faults]
    if not mutation.digests:
        faults = dataclasses.replace(faults, corrupt=0.0)
    for seed in range(3000):
        try:
            World(seed, faults, digests=mutation.digests).run()
        except AssertionError as violation:
            return f"schedule {seed + 1}: {violation}"
    return "NOT NOTICED"


def noticed_by_search(mutation: Mutation) -> str:
    try:
        explore((mutation.moves,), 2, digests=mutation.digests, tries=mutation.tries)
    except Violation as violation:
        what, _, *way = str(violation).splitlines()
        return f"after {len(way)} events: {what}"
    return "NOT NOTICED"


def mutations() -> bool:
    all_noticed = True
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutation.take_out(patch)
            found = noticed_by_schedules(mutation), noticed_by_search(mutation)
        print(f"{mutation.name:38} {found[0]:70} {found[1]}", flush=True)
        all_noticed &= "NOT NOTICED" not in found
    return all_noticed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.protocol")
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("schedules", help="random schedules, and how many a minute")
    timed.add_argument("--seconds", type=float, default=60)
    walked = commands.add_parser("exhaustive", help="every schedule of a small case")
    walked.add_argument(
        "--works", choices=["P", "M", "PP", "PM", "MM"], default="PM", help="prompts, and sequences that move"
    )
    walked.add_argument("--tries", type=int, default=1, help="how often each may be offered")
    walked.add_argument("--faults", type=int, default=2)
    walked.add_argument("--no-digests", action="store_true")
    walked.add_argument("--part", default="1/1", help="2/3: the second third of the last layer")
    commands.add_parser("mutations", help="each rule taken out, in both")
    arguments = parser.parse_args()
    if arguments.command == "schedules":
        schedules(arguments.seconds)
    elif arguments.command == "exhaustive":
        part, _, parts = arguments.part.partition("/")
        exhaustive(
            arguments.works,
            arguments.faults,
            arguments.tries,
            not arguments.no_digests,
            int(part),
            int(parts),
        )
    else:
        return 0 if mutations() else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
