"""What CI repeats, and what it says of that: `.ci/run` on a project of two tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
INSTALLED = ("dockerd", "docker-compose", "debootstrap", "ip")  # else it asks apt for them
MAKEFILE = "test:\n\t.venv/bin/python -m pytest\nlint:\n"
TESTS = """
import pathlib, pytest

def fails(times):
    runs = pathlib.Path("runs")
    runs.write_text((runs.read_text() if runs.exists() else "") + "x")
    assert len(runs.read_text()) > times

{mark}
def test_that_fails():
    fails({times})

def test_that_passes():
    pass
"""


def ci(folder: Path, *, system: bool, times: int) -> tuple[int, str, int]:
    """Exit code and output where one test, of a whole system or not, fails its first `times` runs; how
    often it was run."""
    for name in (*INSTALLED, ".ci/run", ".venv/bin/python"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        path.chmod(0o755)
    (folder / ".ci" / "run").write_bytes(RUN.read_bytes())
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = system\n")
    mark = "@pytest.mark.system" if system else ""
    (folder / "test_two.py").write_text(TESTS.format(mark=mark, times=times))
    done = subprocess.run(
        [folder / ".ci" / "run"],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, len((folder / "runs").read_text())


def test_a_whole_system_that_failed_is_repeated_and_listed_at_the_end(tmp_path: Path) -> None:
    code, said, runs = ci(tmp_path, system=True, times=1)
    assert (code, runs) == (0, 2), said
    assert said.endswith("CI: failed, and passed when repeated:\ntest_two.py::test_that_fails\n")


def test_a_whole_system_that_fails_twice_fails_the_run(tmp_path: Path) -> None:
    code, said, runs = ci(tmp_path, system=True, times=2)
    assert (code, runs) == (1, 2), said
    assert "passed when repeated" not in said


def test_nothing_else_is_repeated(tmp_path: Path) -> None:
    code, said, runs = ci(tmp_path, system=False, times=1)
    assert (code, runs) == (1, 1), said
    assert "CI: what failed there needs no whole system: it is not repeated" in said


@pytest.mark.parametrize("system", [True, False])
def test_where_nothing_fails_everything_is_run_once(tmp_path: Path, system: bool) -> None:
    code, said, runs = ci(tmp_path, system=system, times=0)
    assert (code, runs) == (0, 1), said
    assert "repeated" not in said
