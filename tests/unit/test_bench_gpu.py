"""`make bench-gpu`, as far as a host shows it: its loads, its floors, and what a crash costs."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import pytest
import torch

from bench.gpu import __main__ as bench_gpu
from bench.gpu.cases import covered, prefill_flops
from bench.gpu.free_products import FreeProducts, products_without_an_order
from bench.gpu.limits import DeviceLimits
from common.engine.devices.cuda import backend
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


def test_what_the_rule_costs_is_the_ratio_of_two_loads() -> None:
    report = {
        "decode, batch 1": {"step_ms": 11.0},
        "without an order, decode, batch 1": {"step_ms": 10.0},
        "without an order, prefill, 8192 tokens": {"first_token_ms": 3.0},
        "limits": {"copy_bytes": 1.0},
    }
    assert bench_gpu.rule_costs(report) == {"decode, batch 1": pytest.approx(0.1)}


def test_products_without_an_order_give_what_ours_are_near_to() -> None:
    """silu(gate) * up, and a bias."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (12, 8), (12,)))
    gate, up = (weight @ x.T).T.chunk(2, dim=-1)
    torch.testing.assert_close(
        FreeProducts().gated_linear(weight, None)(x, 0), torch.nn.functional.silu(gate) * up
    )
    torch.testing.assert_close(FreeProducts().linear(weight, bias)(x, 0), x @ weight.T + bias)


def test_they_take_the_place_of_ours_only_for_a_while() -> None:
    ours = backend.GpuProducts
    with products_without_an_order():
        assert backend.GpuProducts is FreeProducts
    assert backend.GpuProducts is ours
