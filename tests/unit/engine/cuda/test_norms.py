"""The norms' kernels, interpreted, against the reference backend's."""

from __future__ import annotations

import pytest
import torch

from common.engine.devices.cuda.norms import add_rms_norm, rms_norm
from common.engine.devices.reference.backend import ReferenceBackend

EPS = 1e-6


def close(mine: torch.Tensor, wanted: torch.Tensor) -> bool:
    """The sum of squares has another order: a last digit may differ."""
    return torch.allclose(mine.float(), wanted.float(), rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 96, 1000, 1024])
def test_norms_equal_the_reference(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, held = (torch.randn(5, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    reference, out = ReferenceBackend(torch.device("cpu"), dtype, "cpu"), torch.empty_like(x)

    rms_norm(x, weight, out, EPS)
    assert close(out, reference.rms_norm(x, weight, EPS))

    mine, theirs = held.clone(), held.clone()
    add_rms_norm(x, mine, weight, out, EPS)
    assert close(out, reference.add_rms_norm(x, theirs, weight, EPS))
    assert torch.equal(mine, theirs)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, out, alone = torch.ones(96).bfloat16(), torch.empty_like(x), torch.empty_like(x)
    rms_norm(x, weight, out, EPS)
    for row in range(9):
        rms_norm(x[row : row + 1], weight, alone[row : row + 1], EPS)
    assert torch.equal(out, alone)
