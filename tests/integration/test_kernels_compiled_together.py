"""Processes that start at once on a machine without compiled kernels: each kernel is compiled by one of them,
and nobody waits for one that does not go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
import os, sys
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from common.engine.devices.cpu.numba_runtime import exact

@intrinsic
def hang(context, x):
    "Where the process is told to, it stays in the middle of the compilation until its input ends."
    def generate(context, builder, signature, arguments):
        if "hangs" in sys.argv:
            print("in the middle", flush=True)
            sys.stdin.read()
        return arguments[0]
    return types.float64(types.float64), generate

@exact
def one(x):
    return hang(x) + 1.0

@exact
def two(x):
    return x * one(x)

@exact
def three(x):
    return x + 3.0
"""

PROGRAM = """
import resource, sys
sys.path.insert(0, {folder!r})
from common.engine.devices.cpu import kernel_cache
from common.logs import configure
configure("test", "info")
import kernels
if "impatient" in sys.argv:
    kernel_cache.LONGEST_WAIT_S = 0.1
if "full" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
print("started", flush=True)
sys.stdin.readline()
assert [kernels.one(1.0), kernels.two(2.0), kernels.three(3.0)] == [2.0, 6.0, 6.0]
print("computed", flush=True)
"""

ALL = ["one", "three", "two"]


class Starting:
    """A process that needs three kernels once it is told to go on, and what it says."""

    def __init__(self, home: Path, *how: str) -> None:
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(folder=str(home)), *how],
            env=os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.until("started")

    def until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if words in line:
                return
        raise AssertionError(f"it ended without {words!r}: {self.said}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def go_on(self) -> None:
        """Out of the middle of a compilation."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    @property
    def compiled(self) -> list[str]:
        return self.kernels("compiling")

    @property
    def waited_for(self) -> list[str]:
        return self.kernels("waiting")

    def kernels(self, event: str) -> list[str]:
        lines = [line for line in self.said if f" kernels.{event} " in line]
        return [line.partition("kernel=")[2].split()[0] for line in lines]


Start = Callable[..., Starting]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    tmp_path.joinpath("kernels.py").write_text(KERNELS)
    started: list[Starting] = []

    def begin(*how: str) -> Starting:
        started.append(Starting(tmp_path, *how))
        return started[-1]

    yield begin
    for each in started:
        with each.process:
            each.process.kill()


def test_each_kernel_is_compiled_by_one_of_the_processes_that_start_together(start: Start) -> None:
    together = [start() for _ in range(3)]
    for each in together:
        each.go()
    for each in together:
        each.until("computed")
    assert sorted(kernel for each in together for kernel in each.compiled) == ALL
    late = start()
    late.go()
    late.until("computed")
    assert late.compiled == []


def test_who_waits_says_so_and_goes_on_when_the_process_that_compiles_is_killed(start: Start) -> None:
    first, second = start("hangs"), start()
    first.go()
    first.until("in the middle")
    second.go()
    second.until("kernels.waiting")
    assert second.waited_for == ["one"]
    first.process.kill()
    second.until("computed")
    assert sorted(second.compiled) == ALL


def test_nobody_waits_for_long_for_a_process_that_is_stopped(start: Start) -> None:
    first, second = start("hangs"), start("impatient")
    first.go()
    first.until("in the middle")
    first.process.send_signal(signal.SIGSTOP)
    second.go()
    second.until("computed")
    assert second.kernels("waited_in_vain") == ["one"]
    assert sorted(second.compiled) == ALL
    first.process.send_signal(signal.SIGCONT)
    first.go_on()
    first.until("computed")


def test_who_waits_for_a_process_whose_disk_is_full_compiles_by_itself(start: Start) -> None:
    """And holds up nobody meanwhile."""
    full, hanging, last = start("hangs", "full"), start("hangs"), start()
    full.go()
    full.until("in the middle")
    hanging.go()
    hanging.until("kernels.waiting")
    full.go_on()
    hanging.until("in the middle")
    last.go()  # only now: it would be the faster of the two, and leave nothing to compile
    last.until("computed")
    assert sorted(last.compiled) == ALL
