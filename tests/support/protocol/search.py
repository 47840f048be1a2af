"""Every schedule of a small case: a walk over the graph of all states that can be reached.

A depth-first walk, one layer after another: all that is reached without a fault, then all that one
fault more leads to. A state that was reached with fewer faults is not walked again: what may happen
after it with fewer faults left may happen with more.

Liveness: within a layer the walk follows steps without faults only. It ends wherever nothing can
happen, where everything must be idle; and it must not come back to a state that it stands in, for
that would be a schedule without end. So from every state, every schedule without further faults
ends, and ends idle.

In the last layer, where no fault can follow, prompts that cannot matter to each other any more are
not interleaved: the steps of one are a persistent set, since all of them commute with all of the
other's (`System.are_independent`), and no cycle can leave one out for ever, as there are none.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.protocol.model import Violation
from tests.support.protocol.system import Choice, System, load, save


@dataclasses.dataclass(slots=True)
class Found:
    states: int = 0
    transitions: int = 0
    ends: int = 0  # states in which nothing can happen any more

    def add(self, other: Found) -> None:
        self.states += other.states
        self.transitions += other.transitions
        self.ends += other.ends


Way = tuple[Any, ...]
"""How a state was reached, backwards: (the way before, the choice), or () at the start."""

Kept = tuple[bytes, Way]


def _told(way: Way) -> str:
    choices: list[str] = []
    while way:
        way, choice = way
        choices.append(f"{choice.kind} {choice.what} {choice.request}".rstrip())
    return "\n  ".join(["after", *reversed(choices)])


@dataclasses.dataclass(slots=True, eq=False)
class _Frame:
    """A state that the walk stands in, and what is left to try there."""

    view: int
    system: System | None  # for the first step; then a copy is made out of `data`
    data: bytes
    steps: list[Choice]
    way: Way


class Walk:
    """One layer. `seen` holds the hashes of all views so far, 64 bits each."""

    def __init__(self, seen: set[int], *, last: bool) -> None:
        self.seen, self.last = seen, last
        self.found = Found()
        self.kept: list[Kept] = []  # states of this layer, from which faults are still possible

    def walk(self, system: System, choice: Choice | None, way: Way = ()) -> None:
        """What `choice` leads to in a state, and all that follows without faults. `Violation` says
        by which way."""
        standing: set[int] = set()
        stack: list[_Frame] = []
        while True:
            if choice is not None:
                way = (way, choice)
            try:
                if choice is not None:
                    system.take(choice)
                frame = self._enter(system, way, standing)
            except Violation as violation:
                raise Violation(f"{violation}\n{_told(way)}") from None
            if frame is not None:
                stack.append(frame)
                standing.add(frame.view)
            while stack and not stack[-1].steps:
                standing.discard(stack.pop().view)
            if not stack:
                return
            frame = stack[-1]
            system, frame.system = frame.system or load(frame.data), None
            choice, way = frame.steps.pop(), frame.way

    def _enter(self, system: System, way: Way, standing: set[int]) -> _Frame | None:
        """A state that was not seen before, checked; None for one that was."""
        view = hash(system.view())
        self.found.transitions += 1
        if view in self.seen:
            if view in standing:
                raise Violation("a schedule without end")
            return None
        system.check()
        steps = self._steps(system)
        if not steps:
            system.check_quiet()
            self.found.ends += 1
        self.seen.add(view)
        self.found.states += 1
        data = save(system) if len(steps) > 1 or not self.last else b""
        if not self.last:
            self.kept.append((data, way))
        return _Frame(view, system, data, steps, way)

    def _steps(self, system: System) -> list[Choice]:
        steps = system.steps()
        if self.last and len(steps) > 1 and system.are_independent():
            for name in system.work:
                if own := [step for step in steps if step.request == name]:
                    return own
        return steps

    def walk_faults(self, states: Iterable[Kept]) -> Found:
        """One fault more in each of these states, then all that follows."""
        for data, way in states:
            for fault in load(data).faults():
                self.walk(load(data), fault, way)
        return self.found


def _collect_seldom() -> None:
    """Systems are full of circles and short-lived; what is kept is not: look at little, and seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


_shared: Walk  # of a worker process: it was forked with what is known already
_states: list[Kept]


def _share(part: int, parts: int) -> Found:
    _collect_seldom()
    return _shared.walk_faults(_states[part::parts])


def explore(
    prompts: int, faults: int, *, digests: bool = True, processes: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> Found:  # fmt: skip
    """Walk everything. `Violation` for anything that must not be.

    With several processes each walks a share of the last layer; what two of them reach is counted
    twice.
    """
    _collect_seldom()
    walk = Walk(set(), last=faults == 0)
    walk.walk(System(prompts, digests=digests), None)
    total = walk.found
    for layer in range(1, faults + 1):
        say(f"{layer - 1} faults: {total}")
        states = walk.kept
        walk = Walk(walk.seen, last=layer == faults)
        if processes > 1 and walk.last:
            _in_processes(walk, states, processes)
        else:
            walk.walk_faults(states)
        total.add(walk.found)
    say(f"{faults} faults: {total}")
    return total


def _in_processes(walk: Walk, states: list[Kept], processes: int) -> None:
    global _shared, _states
    _shared, _states = walk, states
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        for found in pool.map(_share, range(processes), [processes] * processes):
            walk.found.add(found)
