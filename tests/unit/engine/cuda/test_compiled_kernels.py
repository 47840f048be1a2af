"""Every GPU kernel becomes machine code for every card, without a GPU.

The compiler runs in a process of its own, for in that of the tests kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from bench.gpu_kernels import KINDS, SHARED_LIMIT, TARGETS

MOST_REGISTERS = 255  # of a thread, on every card


@pytest.fixture(scope="module", params=KINDS)
def codes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-m", "bench.gpu_kernels", "--json", "--kind", request.param],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [json.loads(line) for line in said.splitlines()]


def test_every_kernel_compiles_for_every_card(codes: list[dict[str, Any]]) -> None:
    assert {code["target"] for code in codes} == set(TARGETS)
    assert all(0 < code["registers"] <= MOST_REGISTERS for code in codes)


def test_no_kernel_spills_registers(codes: list[dict[str, Any]]) -> None:
    assert [code for code in codes if code["spilled"]] == []


def test_every_kernel_fits_into_shared_memory(codes: list[dict[str, Any]]) -> None:
    assert [code for code in codes if code["shared"] > SHARED_LIMIT[code["target"]]] == []


def test_no_multiplication_is_fused_with_a_sum(codes: list[dict[str, Any]]) -> None:
    assert [code for code in codes if code["fused"] and not code["may_fuse"]] == []


def test_one_row_and_thousands_are_multiplied_by_one_kind_of_instruction(codes: list[dict[str, Any]]) -> None:
    """Of any number of columns, which are rows of activations: another kind could sum in another order."""
    for target in TARGETS:
        products = [code for code in codes if code["target"] == target and code["name"].startswith("product")]
        kinds = {re.sub(r"n\d+k", "nXk", name) for code in products for name in code["products"] or ["none"]}
        assert len(kinds) == 1


def test_attention_multiplies_generated_rows_and_prompts_by_one_family(codes: list[dict[str, Any]]) -> None:
    """Instructions of another family sum in another way: a reply's blocks would not be a prompt's."""
    families: dict[int, set[str]] = {}
    for code in codes:
        if "attention" in code["name"] and code["products"]:
            of = {"wgmma" if "wgmma" in product else product for product in code["products"]}
            families.setdefault(code["target"], set()).update(of)
    assert all(of == {"wgmma" if t == 90 else "mma.sync.aligned.m16n8k16"} for t, of in families.items())


def test_attention_reads_keys_and_values_by_16_bytes(codes: list[dict[str, Any]]) -> None:
    """Of those in 8 bits, where a row has half the bytes, some by 8."""
    attention = [code for code in codes if code["name"].startswith("attention") and code["products"]]
    plain = [code for code in attention if "float8" not in code["name"]]
    assert [code for code in plain if code["copies"] != [16]] == []
    narrow = [code for code in attention if "float8" in code["name"]]
    assert [code for code in narrow if not {16} <= {*code["copies"]} <= {8, 16}] == []
