"""Compiled kernels: the same bits from a cold cache and a warm one, and a cache that may be shared,
stale, or impossible."""

from __future__ import annotations

import ast
import importlib.util
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import codegen

from common.engine.devices.cpu import compilation, kernel_cache, numba_runtime

ROOT = Path(__file__).resolve().parents[2]
DECORATORS = {"kernel", "inline", "exact", "exact_kernel", "intrinsic", "overload"}

PROGRAM = """
import hashlib, sys
import torch
from common.engine import Engine, SamplingParams
from common.logs import configure
configure("test", "warning")
digest = hashlib.blake2b(digest_size=16)
for dtype in sys.argv[1:]:
    engine = Engine.load(dtype=dtype, threads=1, num_kv_blocks=32)
    original = engine.runner.model.logits
    def logits(hidden):
        rows = original(hidden)
        digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return rows
    engine.runner.model.logits = logits
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, prompt_logprobs=0)
    engine.generate([list(range(7, 157))], params)
print(digest.hexdigest())
"""


def start(home: Path, *dtypes: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= variables
    with home.joinpath("log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *dtypes],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def bits(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    return output.strip()


def both(home: Path) -> tuple[list[str], Counter[str]]:
    """What two processes at the same time compute, and which kernels they and their helpers compile."""
    log = home / "log"
    log.write_text("")
    computed = [bits(process) for process in [start(home, "float32"), start(home, "bfloat16")]]
    return computed, Counter(re.findall(r"kernels\.compiling kernel=(\w+)", log.read_text()))


@pytest.mark.slow
def test_a_cold_and_a_warm_cache_give_the_same_bits(tmp_path: Path) -> None:
    """And so do two processes that fill one cache at the same time, with other kernels each."""
    cold, compiled = both(tmp_path)
    assert {kernel: compiled[kernel] for kernel in ("rms_norm", "sample_rows", "target_logprobs")} == {
        "rms_norm": 2,  # for each type of numbers
        "sample_rows": 1,
        "target_logprobs": 1,
    }
    assert both(tmp_path) == (cold, Counter())


def test_kernels_use_no_memory_that_they_gave_back(tmp_path: Path) -> None:
    """numba gives an array back after the last use that it knows of, and an address is none. Here glibc
    overwrites what is given back."""
    home = {"HOME": str(Path.home())}  # whose kernels are compiled already
    ones = [start(tmp_path, "float32", "bfloat16", **home, MALLOC_PERTURB_=given) for given in ("0", "165")]
    as_ever, overwritten = [bits(process) for process in ones]
    assert as_ever == overwritten


NORM = """
import sys
import torch
from common.engine.devices.cpu.backend import CpuBackend
rows = torch.full((1, 4), 2.0)
print(CpuBackend(rows.dtype, 1).rms_norm(rows, torch.ones(4), 0.0).tolist())
print("scipy.linalg" in sys.modules)
"""


def test_a_kernel_is_compiled_without_a_compiler_a_cache_or_a_blas(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NORM],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "[[1.0, 1.0, 1.0, 1.0]]\nFalse\n"
    assert list(tmp_path.glob(".cache/pdq/kernels-*/**/*.nbc"))


def test_a_change_of_any_kernel_source_has_a_cache_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = numba_runtime.kernel_sources()
    now = kernel_cache.directory(sources)
    assert Path(now).parent == tmp_path / ".cache" / "pdq"
    assert kernel_cache.directory(sources[1:]) != now


@pytest.mark.parametrize("option", ["OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE"])
def test_an_option_of_numba_leads_to_another_folder_and_another_numerics_class(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes the order of a sum, and numba would load what was compiled with another one."""
    folder, target = kernel_cache.directory(()), numba_runtime.target()
    monkeypatch.setattr(numba.config, option, "another")
    assert kernel_cache.directory(()) != folder
    assert numba_runtime.target() != target


def compiled_from() -> set[Path]:
    """The engine's files that have a compiled function, or a constant or function that one uses."""
    found: set[Path] = set()
    for path in sorted((ROOT / "common" / "engine").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compiled = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and names(node.decorator_list) & DECORATORS
        ]
        constants = [
            node
            for node in tree.body
            if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Attribute)
        ]
        if not compiled:
            continue
        found.add(path)
        used = names(node for part in compiled + constants for node in ast.walk(part))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and used & {alias.name for alias in node.names}:
                module = ROOT / f"{str(node.module).replace('.', '/')}.py"
                found |= {module} if module.is_relative_to(ROOT / "common" / "engine") else set()
    return found


def names(nodes: Iterable[ast.AST]) -> set[str]:
    """`f` of `f`, `f(…)`."""
    called = (node.func if isinstance(node, ast.Call) else node for node in nodes)
    return {node.id for node in called if isinstance(node, ast.Name)}


def test_the_cache_is_keyed_by_all_that_is_compiled_and_by_how_it_is_kept() -> None:
    """And by nothing else: what is changed elsewhere compiles nothing anew."""
    how = {Path(module.__file__) for module in (compilation, kernel_cache)}
    assert set(numba_runtime.kernel_sources()) == compiled_from() | how


def test_without_a_home_the_cache_is_a_private_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    folder = Path(kernel_cache.directory(())).parent
    assert folder == tmp_path / f"pdq-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "/proc/no/such/home")
    assert Path(kernel_cache.directory(())).parent == folder


def test_where_nothing_can_be_written_kernels_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no/such/folder")
    monkeypatch.setenv("HOME", "/proc/no/such/home")
    assert kernel_cache.directory(()) == ""


KERNEL = """
from common.engine.devices.cpu.numba_runtime import exact
@exact
def double(x):
    return x + x
"""


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder that is empty."""
    folder = tmp_path / "kernels"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    monkeypatch.setattr(kernel_cache, "_warned", set())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the module below: the disk is full
    (tmp_path / "one_kernel.py").write_text(KERNEL)
    return folder


def loaded(source: Path) -> Any:
    """A module's kernels, as a new process has them."""
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(cold: Path, source: Path | None = None) -> Any:
    """A kernel as a new process has it, which has computed once."""
    module = loaded(source or cold.parent / "one_kernel.py")
    assert module.double(21.0) == 42.0
    return module.double


def from_cache(cold: Path, source: Path | None = None) -> bool:
    return bool(sum(compiled(cold, source).stats.cache_hits.values()))


def test_a_kernel_is_compiled_once(cold: Path) -> None:
    assert not from_cache(cold)
    assert from_cache(cold)


def test_the_same_sources_elsewhere_compile_nothing_and_others_do(cold: Path) -> None:
    """Another checkout, or another environment of the same release."""
    assert not from_cache(cold)
    elsewhere = cold.parent / "elsewhere"
    elsewhere.mkdir()
    source = elsewhere / "one_kernel.py"
    source.write_text(KERNEL)
    assert from_cache(cold, source)
    source.write_text(KERNEL.replace("x + x", "2 * x"))
    assert not from_cache(cold, source)
    assert from_cache(cold)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other bytes"])
@pytest.mark.parametrize("kind", ["nbc", "nbi"])
def test_a_damaged_file_counts_as_absent_and_is_replaced(
    cold: Path, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it still unpickles: what would be run is machine code."""
    compiled(cold)
    (path,) = cold.glob(f"**/*.{kind}")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    contents = {"truncated": data[:-9], "empty": b"", "other bytes": b"cos\nsystem\n"}
    path.write_bytes(contents.get(damage, data))
    assert not from_cache(cold)
    assert caplog.text.count("not_cached") == 1
    assert from_cache(cold)


def test_on_a_full_disk_kernels_are_compiled_anew_and_it_is_said_once(
    cold: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert not from_cache(cold)
        assert not from_cache(cold)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("not_cached") == 1
    assert from_cache(cold) or from_cache(cold)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_that_is_gone_or_is_none_costs_a_compilation(cold: Path, when: str) -> None:
    """Another process cleans up, or something else has its name."""
    if when == "after":
        compiled(cold)
        shutil.rmtree(cold)
    cold.write_text("a file")
    assert not from_cache(cold)


def test_a_folder_of_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies in it would be run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    nobody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    assert kernel_cache.directory(()) == ""


PARTS = """
import numpy as np
from numba import prange
from common.engine.devices.cpu.numba_runtime import exact, kernel

@exact
def square(x):
    return x * x

@exact
def cube(x):
    return x * square(x)

@kernel
def cubes(values):
    for i in prange(len(values)):
        values[i] = cube(values[i])
"""


def test_what_a_kernel_calls_becomes_machine_code_with_it_only(
    monkeypatch: pytest.MonkeyPatch, cold: Path
) -> None:
    """Also the body of its loop; and each of them can still be called by itself, before or afterwards."""
    emitted = []
    optimize = codegen.CPUCodeLibrary._optimize_final_module
    monkeypatch.setattr(
        codegen.CPUCodeLibrary,
        "_optimize_final_module",
        lambda library: (emitted.append(library.name), optimize(library)),
    )
    source = cold.parent / "parts.py"
    source.write_text(PARTS)
    module = loaded(source)
    assert module.square(3.0) == 9.0
    values = np.arange(4.0)
    module.cubes(values)
    assert values.tolist() == [0.0, 1.0, 8.0, 27.0]
    assert emitted == ["square", "cubes"]
    assert (module.cube(2.0), module.square(2.0)) == (8.0, 4.0)
    assert emitted == ["square", "cubes", "cube"]
    names = {path.name.split("-")[0] for path in cold.glob("**/*.nbc")}
    assert names == {"parts.square", "parts.cubes", "parts.cube"}
