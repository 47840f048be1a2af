"""Two processes of tests: what each is given, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.schedule import Schedule

SYSTEMS = ["tests/e2e/test_serve.py::test_a", "tests/faults/test_drain.py::test_a"]
CONTAINERS = ["tests/e2e/test_compose.py::test_a", "tests/e2e/test_compose.py::test_b"]
FILES = [f"tests/integration/test_{number}.py::test_a" for number in range(20)]


class Process:
    """One that runs tests; here they are over when the test says so."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.shutting_down = False
        self.gateway = SimpleNamespace(id="one of them")

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += [COLLECTED[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


COLLECTED = [*SYSTEMS, *FILES, *CONTAINERS]


class Running:
    def __init__(self, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pytestconfig.option, "loadscopereorder", False, raising=False)
        monkeypatch.setattr(pytestconfig.option, "tx", ["2*popen"], raising=False)
        self.schedule = Schedule(pytestconfig)
        self.processes = [Process(), Process()]
        for process in self.processes:
            self.schedule.add_node(process)
        for process in self.processes:
            self.schedule.add_node_collection(process, COLLECTED)
        self.schedule.schedule()
        self.ended: set[str] = set()

    def end(self, process: Process) -> str:
        """The first test that runs there is over."""
        test = next(test for test in process.given if test not in self.ended)
        self.ended.add(test)
        self.schedule.mark_test_complete(process, COLLECTED.index(test))
        return test

    def to_the_end(self, process: Process) -> None:
        while set(process.given) - self.ended:
            self.end(process)


@pytest.fixture
def running(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(pytestconfig, monkeypatch)


def test_one_process_has_the_systems_and_the_other_one_the_files(running: Running) -> None:
    one, two = running.processes
    assert set(SYSTEMS) <= set(one.given)
    assert not set(two.given) & {*SYSTEMS, *CONTAINERS}


def test_containers_come_once_the_systems_are_over_and_in_the_other_process(running: Running) -> None:
    one, two = running.processes
    running.end(two)
    assert not set(CONTAINERS) & set(two.given)
    for _ in SYSTEMS:
        running.end(one)
    running.end(two)
    assert two.given[-len(CONTAINERS) :] == CONTAINERS
    running.to_the_end(one)
    running.to_the_end(two)
    assert running.ended == set(COLLECTED)
    assert not set(one.given) & set(CONTAINERS)
    assert one.shutting_down
    assert two.shutting_down


def test_whoever_had_systems_leaves_containers_to_the_other_one(running: Running) -> None:
    one, two = running.processes
    running.to_the_end(one)
    assert one.shutting_down
    assert not set(one.given) & set(CONTAINERS)
    running.to_the_end(two)
    assert running.ended == set(COLLECTED)
