"""Kernels run on torch's OpenMP, and on machines that have none of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import numba, numpy as np
from common.engine.devices.cpu.numba_runtime import kernel

@kernel
def total(values):
    result = 0.0
    for index in numba.prange(len(values)):
        result += values[index]
    return result

assert total(np.ones(1000)) == 1000.0
assert numba.threading_layer() == "omp"
with open("/proc/self/maps") as maps:
    loaded = {line.split()[-1] for line in maps if "libgomp" in line}
print(*loaded, sep="\\n")
"""


def test_a_process_has_one_openmp_and_it_is_torchs(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (library,) = done.stdout.split()
    assert "/torch/lib/libgomp" in library
