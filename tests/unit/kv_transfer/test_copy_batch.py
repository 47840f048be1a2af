"""Batches of copies: their arithmetic, and the kernel that does one, interpreted and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from kv_transfer import device_copy
from kv_transfer.copy_batch import CopyBatch


def batch(*copies: tuple[int, int, int]) -> CopyBatch:
    rows = np.array(copies, np.int64).reshape(-1, 3).T
    return CopyBatch(rows[0], rows[1], rows[2])


def rows(copies: CopyBatch) -> list[tuple[int, ...]]:
    columns = (copies.into.tolist(), copies.source.tolist(), copies.lengths.tolist())
    return list(zip(*columns, strict=True))


def test_ranges_are_those_of_every_slab() -> None:
    made = CopyBatch.of_ranges([100, 300], [1000, 2000], [(0, 4), (10, 2)])
    assert rows(made) == [(100, 1000, 4), (110, 1010, 2), (300, 2000, 4), (310, 2010, 2)]
    assert rows(CopyBatch.of_ranges([100, 300], [1000, 2000], [(8, 4)])) == [(108, 1008, 4), (308, 2008, 4)]
    assert made.num_bytes == 12


def test_neighbours_at_both_ends_become_one_copy() -> None:
    made = batch((20, 120, 10), (0, 100, 10), (10, 110, 10), (30, 200, 5), (40, 205, 5), (50, 130, 10))
    assert rows(made.merged()) == [(0, 100, 30), (30, 200, 5), (40, 205, 5), (50, 130, 10)]
    assert rows(batch().merged()) == []
    assert rows(batch((1, 2, 3)).merged()) == [(1, 2, 3)]


def test_merged_copies_move_the_same_bytes() -> None:
    chance = np.random.default_rng(5)
    for _ in range(200):
        count = int(chance.integers(1, 12))
        into, source = chance.permutation(12)[:count] * 8, chance.permutation(12)[:count] * 8
        made = CopyBatch(into, source, np.full(count, 8))
        assert moved(made) == moved(made.merged())
        assert len(made.merged()) <= len(made)


def moved(copies: CopyBatch) -> dict[int, int]:
    return {into + i: source + i for into, source, length in rows(copies) for i in range(length)}


def test_batches_join_to_one() -> None:
    assert rows(CopyBatch.joined([batch((1, 2, 3)), batch((4, 5, 6), (7, 8, 9))])) == [
        (1, 2, 3),
        (4, 5, 6),
        (7, 8, 9),
    ]
    assert len(CopyBatch.joined([])) == 0


PART = device_copy.PART_BYTES


@pytest.mark.parametrize(
    ("wide", "lengths"),
    [(True, [16, PART, PART + 16, 2 * PART + 48]), (False, [1, PART, PART + 1, 2 * PART + 17, 3])],
)
def test_the_kernel_copies_every_byte_of_every_piece_and_no_other(wide: bool, lengths: list[int]) -> None:
    """By triton's interpreter, on memory of the host (tests/conftest.py)."""
    step = 3 * PART + (0 if wide else 5)
    unit = 16 if wide else 1
    room = np.zeros(len(lengths) * step + 64, np.uint8)
    source = np.random.default_rng(3).integers(0, 256, len(room)).astype(np.uint8)
    begins = [-(-one.ctypes.data // 16) * 16 + unit for one in (room, source)]
    order = np.random.default_rng(4).permutation(len(lengths))
    table = np.array(
        [[begins[0] + step * i for i in range(len(lengths))], [begins[1] + step * i for i in order], lengths],
        np.int64,
    )
    assert wide == (not int(np.bitwise_or.reduce(table, axis=None)) % 16)
    grid = (len(lengths), -(-max(lengths) // PART))
    device_copy.copy_pieces[grid](table.ctypes.data, len(lengths), WIDE=wide, PART=PART)
    expected = np.zeros_like(room)
    for into, out_of, length in table.T.tolist():
        to, at = into - room.ctypes.data, out_of - source.ctypes.data
        expected[to : to + length] = source[at : at + length]
    assert (room == expected).all()


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kv_transfer.device_copy import PART_BYTES, WARPS, copy_pieces
for wide in (True, False):
    source = ASTSource(
        copy_pieces,
        signature={"table": "i64", "num_copies": "i32", "WIDE": "constexpr", "PART": "constexpr"},
        constexprs={"WIDE": wide, "PART": PART_BYTES},
    )
    for target in (80, 89, 90, 100, 120):
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": WARPS})
        print(json.dumps({"wide": wide, "target": target, "ptx": made.asm["ptx"]}))
"""


def uninterpreted() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_kernel_compiles_for_every_card_and_moves_16_bytes_at_once() -> None:
    """In a process of its own: in that of the tests kernels are interpreted."""
    said = subprocess.run(
        [sys.executable, "-c", COMPILE], env=uninterpreted(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == 10
    for one in found:
        lines = [line for line in one["ptx"].splitlines() if "@%p" in line]
        loads = [line for line in lines if "ld.global" in line]
        stores = [line for line in lines if "st.global" in line]
        assert loads
        assert len(loads) == len(stores)
        if one["wide"]:
            assert all("v2.b64" in line for line in loads + stores), "16 bytes each"
            assert len(loads) * 16 * 32 * device_copy.WARPS == PART


LAUNCH = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kv_transfer.device_copy import PART_BYTES, compiled

launches = []

class Launcher:
    def __init__(self, source, metadata):
        self.arguments = list(source.signature)

    def __call__(self, *given):
        launches.append([given[:5], given[9:]])
        assert len(given[9:]) == len(self.arguments)

class Utilities:
    def load_binary(self, name, kernel, shared, device):
        assert kernel
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0  # asked for while it compiles; a launch names its own

driver.set_active(Driver())
for wide in (True, False):
    compiled(wide=wide)(1 << 46, 3, 2 * PART_BYTES + 1, 77)
print(json.dumps(launches))
"""


def test_the_kernel_is_compiled_and_launched_as_triton_does_it() -> None:
    """With a driver of triton's that is not there: which arguments reach its launcher, on which stream."""
    said = subprocess.run(
        [sys.executable, "-c", LAUNCH], env=uninterpreted(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    table = 1 << 46
    assert json.loads(said) == [
        [[3, 3, 1, 77, 2], [table, 3, wide, device_copy.PART_BYTES]] for wide in (True, False)
    ]
