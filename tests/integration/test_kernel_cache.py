"""Compiled kernels: the same bits from a cold cache and a warm one, and a cache that may be shared,
stale, or impossible."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.engine import numba_runtime

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import hashlib, sys
import torch
from common.engine import Engine, SamplingParams
digest = hashlib.blake2b(digest_size=16)
for dtype in sys.argv[1:]:
    engine = Engine.load(dtype=dtype, threads=1, num_kv_blocks=32)
    original = engine.model.logits
    def logits(hidden):
        rows = original(hidden)
        digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return rows
    engine.model.logits = logits
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, prompt_logprobs=0)
    engine.generate([list(range(7, 157))], params)
print(digest.hexdigest())
"""


def start(home: Path, *dtypes: str) -> subprocess.Popen[str]:
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *dtypes], env=environment, stdout=subprocess.PIPE, text=True
    )


def bits(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    return output.strip()


def both(home: Path) -> list[str]:
    """Of two processes at the same time."""
    return [bits(process) for process in [start(home, "float32"), start(home, "bfloat16")]]


def test_a_cold_and_a_warm_cache_give_the_same_bits(tmp_path: Path) -> None:
    """And so do two processes that fill one cache at the same time, with other kernels each."""
    cold = both(tmp_path)
    files = list(tmp_path.glob(".cache/pdq/kernels-*/**/*.nbc"))
    assert files
    assert cold == both(tmp_path)
    assert len(list(tmp_path.glob(".cache/pdq/kernels-*/**/*.nbc"))) >= len(files)


def test_a_change_of_any_kernel_source_has_a_cache_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    now = numba_runtime._cache_directory()
    assert Path(now).parent == tmp_path / ".cache" / "pdq"
    monkeypatch.setattr(numba_runtime, "KERNEL_SOURCES", numba_runtime.KERNEL_SOURCES[1:])
    assert numba_runtime._cache_directory() != now


def test_without_a_home_the_cache_is_a_private_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    folder = Path(numba_runtime._cache_directory()).parent
    assert folder == tmp_path / f"pdq-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "/proc/no/such/home")
    assert Path(numba_runtime._cache_directory()).parent == folder


def test_where_nothing_can_be_written_kernels_are_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no/such/folder")
    monkeypatch.setenv("HOME", "/proc/no/such/home")
    assert numba_runtime._cache_directory() == ""
