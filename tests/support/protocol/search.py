"""Every schedule of a small case: a walk over the graph of all states that can be reached.

A depth-first walk, one layer after another: all that is reached without a fault, then all that one
fault more leads to. A state that was reached with fewer faults is not walked again: what may happen
after it with fewer faults left may happen with more.

Liveness: within a layer the walk follows steps without faults only. It ends wherever nothing can
happen, where everything must be idle; and it must not come back to a state that it stands in, for
that would be a schedule without end. So from every state, every schedule without further faults
ends, and ends idle.

Prompts that cannot matter to each other any more (`System.are_independent`): every step and every
fault of one commutes with every step of the other. Hence two reductions. In the last layer, where
no fault can follow, they are not interleaved: the steps of one are a persistent set, and no cycle
can leave the other out for ever, as there are none. And a fault of one prompt is not tried in a
state that a step of the other led to, from one of the same layer: tried before that step it leads
to the same.
"""

from __future__ import annotations

import array
import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common import garbage
from common.child_process import die_with_parent
from tests.support.protocol.model import Violation
from tests.support.protocol.shared import Finished, Turns
from tests.support.protocol.snapshots import load, save
from tests.support.protocol.system import Choice, System


@dataclasses.dataclass(slots=True)
class Found:
    states: int = 0
    transitions: int = 0  # taken, some of them by several processes
    ends: int = 0  # states in which nothing can happen any more


Way = tuple[Any, ...]
"""How a state was reached, backwards: (the way before, the choice), or () at the start."""

Kept = tuple[int, bytes, Way]


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
    independent: bool  # its prompts cannot matter to each other any more


class Walk:
    """One layer. Views are known by their hashes, of 64 bits."""

    def __init__(self, *, last: bool, reduced: bool, before: Walk | None = None) -> None:
        self.last, self.reduced = last, reduced
        self.seen: set[int] = before.seen if before else set()
        self.led_to: dict[int, set[str]] = {}  # states of this layer: by a step of whom in this layer
        self.entered = array.array("q")
        self.ended = array.array("q")
        self.transitions = 0
        self.kept: list[Kept] = []  # states of this layer, from which faults are still possible
        self.finished: Finished | None = None  # by any of the processes that share this layer

    def walk(self, system: System, choice: Choice | None, way: Way = ()) -> None:
        """What `choice` leads to in a state, and all that follows without faults. `Violation` says
        by which way."""
        standing: set[int] = set()
        stack: list[_Frame] = []
        independent = False
        while True:
            if choice is not None:
                way = (way, choice)
            try:
                if choice is not None:
                    system.take(choice)
                frame = self._enter(system, way, standing, choice if independent else None)
            except AssertionError as violation:  # of the model, or of what is proved
                raise Violation(f"{violation}\n{_told(way)}") from violation
            if frame is None:
                system.forget()
            else:
                stack.append(frame)
                standing.add(frame.view)
            while stack and not stack[-1].steps:
                done = stack.pop()
                standing.discard(done.view)
                if self.finished is not None:
                    self.finished.add(done.view)
                if done.system is not None:
                    done.system.forget()
            if not stack:
                return
            frame = stack[-1]
            system, frame.system = frame.system or load(frame.data), None
            choice, way, independent = frame.steps.pop(), frame.way, frame.independent

    def _enter(self, system: System, way: Way, standing: set[int], alone: Choice | None) -> _Frame | None:
        """A state that was not seen before, checked; None for one that was. `alone`: the step that
        led to it, if it could not matter to other prompts."""
        view = hash(system.view())
        self.transitions += 1
        if alone is not None and not self.last:
            self.led_to.setdefault(view, set()).add(alone.request)
        if view in self.seen:
            if view in standing:
                raise Violation("a schedule without end")
            return None
        if self.finished is not None and view in self.finished:
            return None
        system.check()
        steps = system.steps()
        if not steps:
            system.check_quiet()
            self.ended.append(view)
        independent = self.reduced and len(system.work) > 1 and system.are_independent()
        if independent and self.last:
            steps = self._of_one(steps)
        self.seen.add(view)
        self.entered.append(view)
        data = save(system) if len(steps) > 1 or not self.last else b""
        if not self.last:
            self.kept.append((view, data, way))
        return _Frame(view, system, data, steps, way, independent)

    def _of_one(self, steps: list[Choice]) -> list[Choice]:
        """Those of the first prompt that has any."""
        for step in steps:
            if step.request:
                return [other for other in steps if other.request == step.request]
        return steps

    def walk_faults(self, states: Iterable[Kept], led_to: Mapping[int, set[str]]) -> None:
        """One fault more in each of these states of the layer before, then all that follows."""
        for view, data, way in states:
            system = load(data)
            others = led_to.get(view, ())
            for fault in system.faults():
                if not fault.request or all(name == fault.request for name in others):
                    self.walk(load(data), fault, way)
            system.forget()


_shared: Walk  # of a worker process: it was forked with what is known already
_states: list[Kept]
_led_to: Mapping[int, set[str]]
_turns: Turns


def _share(process: int, processes: int) -> tuple[array.array[int], array.array[int], int]:
    """States that were kept one after the other lead to much the same: a process has neighbours."""
    with garbage.paused():
        _shared.walk_faults((_states[turn] for turn in _turns.of(process, processes)), _led_to)
    return _shared.entered, _shared.ended, _shared.transitions


def explore(
    works: Sequence[bool],
    faults: int,
    *,
    tries: int = 1,
    digests: bool = True,
    reduced: bool = True,
    processes: int = 1,
    part: int = 1,
    parts: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> Found:
    """Walk everything; not `reduced`: every interleaving too. `Violation` for anything that must
    not be.

    Several processes walk the last layer together. `part` of `parts`, from 1: only that share of the
    last layer, after all that is before it.
    """
    total = Found()
    walk: Walk | None = None
    with garbage.paused():
        for layer in range(faults + 1):
            before, walk = walk, Walk(last=layer == faults, reduced=reduced, before=walk)
            if before is None:
                walk.walk(System(works, digests=digests, tries=tries), None)
            else:
                states = before.kept
                if walk.last:
                    states = states[len(states) * (part - 1) // parts : len(states) * part // parts]
                if processes > 1 and walk.last:
                    _in_processes(walk, states, before.led_to, processes)
                else:
                    walk.walk_faults(states, before.led_to)
            total.states += len(walk.entered)
            total.ends += len(walk.ended)
            total.transitions += walk.transitions
            say(f"{layer} faults: {total}")
    return total


def _in_processes(walk: Walk, states: list[Kept], led_to: Mapping[int, set[str]], processes: int) -> None:
    global _shared, _states, _led_to, _turns
    _shared, _states, _led_to, _turns = walk, states, led_to, Turns(len(states))
    walk.finished = Finished()
    fork = multiprocessing.get_context("fork")
    entered: set[int] = set()
    ended: set[int] = set()
    with concurrent.futures.ProcessPoolExecutor(
        processes, fork, initializer=die_with_parent(os.getpid())
    ) as pool:
        for states_of_one, ends_of_one, transitions in pool.map(
            _share, range(processes), [processes] * processes
        ):
            entered.update(states_of_one)
            ended.update(ends_of_one)
            walk.transitions += transitions
    walk.entered, walk.ended = array.array("q", entered), array.array("q", ended)
