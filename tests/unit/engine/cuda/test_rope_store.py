"""Norm, rotation and store in one kernel, interpreted, against the reference backend's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from common.engine.devices.cuda.attention import Attention, Segment
from common.engine.devices.device import HeadShape
from common.engine.devices.reference.backend import ReferenceBackend, rotate, store

EPS = 1e-6
BLOCK_SIZE = 16
QWEN = HeadShape(num_heads=8, num_kv_heads=2, head_dim=128, rotary_dim=128, window=0)
OF_96 = dataclasses.replace(QWEN, num_heads=3, num_kv_heads=3, head_dim=96, rotary_dim=96)
PARTLY = dataclasses.replace(QWEN, num_heads=7, num_kv_heads=1, head_dim=80, rotary_dim=32)


class Step:
    """Rows of a step and a pool of NaN, of which the second layer is meant."""

    def __init__(self, shape: HeadShape, dtype: torch.dtype, slots: list[int], *, normed: bool) -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(shape.head_dim)
        rows, heads = len(slots), shape.num_heads + 2 * shape.num_kv_heads

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        self.qkv = normal(rows, heads * shape.head_dim).to(dtype)
        self.slots = torch.tensor(slots)
        self.positions = torch.randint(0, 50, (rows,), generator=generator)
        angles = normal(50, shape.rotary_dim // 2)
        self.rope = angles.cos(), angles.sin()
        weights = 1 + 0.1 * normal(2, shape.head_dim)
        self.norms = (weights[0].to(dtype), weights[1].to(dtype)) if normed else None
        self.size = BLOCK_SIZE * shape.num_kv_heads * shape.head_dim
        self.pool = torch.full((1 + max(slots) // BLOCK_SIZE, 4 * self.size), float("nan"), dtype=dtype)

    def store(self, qkv: Tensor, pool: Tensor) -> None:
        attention = Attention(self.shape, self.dtype, BLOCK_SIZE, capability=90, multiprocessors=1)
        segment = Segment(pool, 2 * self.size, 3 * self.size)
        attention.store(qkv, self.positions, self.slots, segment, self.rope, self.norms, EPS)

    def store_by_reference(self, qkv: Tensor, pool: Tensor) -> None:
        shape = self.shape
        reference = ReferenceBackend(torch.device("cpu"), self.dtype, "cpu")
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = qkv.view(len(qkv), -1, shape.head_dim).split(sizes, 1)
        if self.norms is not None:
            query[:] = reference.rms_norm(query, self.norms[0], EPS)
            key = reference.rms_norm(key, self.norms[1], EPS)
        query[:] = rotate(query, self.positions, self.rope, shape.rotary_dim)
        key = rotate(key, self.positions, self.rope, shape.rotary_dim)
        segments = pool.view(len(pool), 4, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        store(segments[:, 2], key, self.slots)
        store(segments[:, 3], value, self.slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [QWEN, OF_96, PARTLY], ids=lambda shape: shape.head_dim)
def test_rows_are_normed_turned_and_stored_as_by_the_reference(
    shape: HeadShape, dtype: torch.dtype, normed: bool
) -> None:
    step = Step(shape, dtype, [5, -1, 16 * 3 + 15, 16, -1], normed=normed)
    qkv, pool = step.qkv.clone(), step.pool.clone()
    step.store(qkv, pool)
    wanted_qkv, wanted_pool = step.qkv.clone(), step.pool.clone()
    step.store_by_reference(wanted_qkv, wanted_pool)

    asked = shape.num_heads * shape.head_dim
    assert torch.equal(qkv[:, asked:], step.qkv[:, asked:])  # keys and values are left alone
    assert torch.equal(pool.isnan(), wanted_pool.isnan())
    if not normed:  # two products and a sum, rounded the same way
        assert torch.equal(qkv[:, :asked], wanted_qkv[:, :asked])
        assert torch.equal(pool.nan_to_num(), wanted_pool.nan_to_num())
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(qkv, wanted_qkv, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(pool, wanted_pool, rtol=tolerance, atol=4 * tolerance, equal_nan=True)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    step = Step(QWEN, torch.bfloat16, [40, 41, -1, 7], normed=True)
    qkv, pool = step.qkv.clone(), step.pool.clone()
    step.store(qkv, pool)
    slots, positions, alone, pool_alone = step.slots, step.positions, step.qkv.clone(), step.pool.clone()
    for row in range(len(slots)):
        step.slots, step.positions = slots[row : row + 1], positions[row : row + 1]
        step.store(alone[row : row + 1], pool_alone)
    assert torch.equal(qkv, alone)
    assert torch.equal(pool.nan_to_num(), pool_alone.nan_to_num())
