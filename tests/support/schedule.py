"""Which tests run beside which: `make test` has two processes of tests, one for each of two cores.

A file goes to one process as a whole, since its tests share what they start. Whole systems run one
after the other, in the process that begins with them. The other one begins with what needs no compiled
kernels, while the first one compiles them (kernels.py), and makes the images of containers meanwhile
(`docker_ahead`). It runs those as soon as the other systems are over, beside the files that are left, of
which the small ones come last, so that both processes end together.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SYSTEMS, CONTAINERS = "whole systems", "containers"
ENGINES = ("tests/unit/engine/", "tests/unit/prefill_node/", "tests/unit/decode_node/")


def arrange(items: list[pytest.Item]) -> None:
    """Mark what starts whole systems, and put all tests into the order above."""
    places = {item: scope(item.nodeid) for item in items}
    for item, place in places.items():
        if place in (SYSTEMS, CONTAINERS):
            item.add_marker("system")
    items.sort(key=lambda item: _turn(places[item]))


def _turn(place: str) -> int:
    if place in (SYSTEMS, CONTAINERS):
        return 0 if place == SYSTEMS else 4
    if place.startswith(ENGINES):
        return 3
    return 1 if not needs_kernels(place) else 2


def needs_kernels(place: str) -> bool:
    """Whether tests of this scope may run an engine, here or in a process of their own."""
    return not place.startswith(("tests/unit/", "tests/fuzz/")) or place.startswith(ENGINES)


def scope(nodeid: str) -> str:
    """What goes to one process with this test: its file, or a kind of system."""
    file = nodeid.partition("::")[0]
    if file == "tests/e2e/test_compose.py":
        return CONTAINERS
    return SYSTEMS if file.startswith(("tests/e2e/", "tests/faults/")) else file


class Schedule(LoadScopeScheduling):  # type: ignore[misc]
    """In the order of the tests; but containers as the module says, where there is more than one process."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)

    def _reschedule(self, node: Any) -> None:
        if list(self.workqueue) == [CONTAINERS] and self._had_systems(node):
            node.shutdown()
        else:
            super()._reschedule(node)

    def _assign_work_unit(self, node: Any) -> None:
        if CONTAINERS in self.workqueue:
            now = self._systems_are_over and not self._had_systems(node)
            self.workqueue.move_to_end(CONTAINERS, last=not now)
        super()._assign_work_unit(node)

    def _had_systems(self, node: Any) -> bool:
        return SYSTEMS in self.assigned_work[node]

    @property
    def _systems_are_over(self) -> bool:
        assigned = [work[SYSTEMS] for work in self.assigned_work.values() if SYSTEMS in work]
        return SYSTEMS not in self.workqueue and all(all(tests.values()) for tests in assigned)
