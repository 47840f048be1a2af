"""`make bench-gpu`, as far as a host shows it: its loads, its floors, and what a crash costs."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import pytest

from bench.gpu import __main__ as bench_gpu
from bench.gpu.cases import covered, prefill_flops
from bench.gpu.limits import DeviceLimits
from common.model_files import SHIPPED_MODEL
from common.model_folder.description import read_config
from common.model_folder.model_config import parse_model_config

ON_A_HOST = argparse.Namespace(device="cpu", model=str(SHIPPED_MODEL), quick=True)


def test_every_load_gives_its_figures() -> None:
    found = dict(bench_gpu.run_part("engine", ON_A_HOST, within_s=300))
    assert not any("error" in values for values in found.values())
    assert {"limits", "start", "decode, batch 64", "prefill, 256 tokens", "16 x (32 + 32)"} <= found.keys()
    assert set(found["limits"]) >= {field.name for field in dataclasses.fields(DeviceLimits)}
    assert all(
        values["floor_ms"] > 0 for name, values in found.items() if name.startswith(("decode", "prefill"))
    )


def test_a_part_that_ends_early_or_late_says_so_and_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert list(bench_gpu.run_part("engine", ON_A_HOST, 60)) == [
        ("engine", {"error": "ended with 1; see above"})
    ]


def test_floors_of_qwen3_8b_are_those_of_the_design() -> None:
    """8k tokens at 790 TFLOP/s: 169 ms."""
    config = parse_model_config(read_config(bench_gpu.MODEL, {}, required=True))
    assert prefill_flops(config, 8192) / 790e12 == pytest.approx(0.169, rel=0.03)


def test_time_that_two_kernels_share_counts_once() -> None:
    assert covered([(0, 2), (1, 3), (1, 1.5), (5, 6)]) == 4
