"""Keys and values in 8 bits: what may be lost of a row, and what never is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.engine.devices.scaled_rows import LEAST_EXPONENT, TOP_EXPONENTS, scaled, unscaled

FORMATS = list(TOP_EXPONENTS)
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)
SIGNIFICANT = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 3}  # bits, the leading one included
LEAST_NORMAL = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}  # exponents (OFP8, table 1)


def back(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return unscaled(*scaled(rows, dtype))


def bound(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding may change: half a unit in the last place of the format, `2**-bits` of a normal
    number, and of smaller ones half the distance of subnormals, in units of the row's scale."""
    bits, least = SIGNIFICANT[dtype], LEAST_NORMAL[dtype]
    scale = scaled(rows, dtype)[1].double().unsqueeze(-1)
    return torch.maximum(rows.double().abs() * 2.0**-bits, scale * 2.0 ** (least - bits))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
a_row = st.lists(floats | st.floats(-8.0, 8.0, width=32), min_size=1, max_size=80)


@every_format
@given(numbers=a_row)
@settings(max_examples=400, deadline=None)
def test_no_element_is_changed_by_more_than_the_format_rounds(
    dtype: torch.dtype, numbers: list[float]
) -> None:
    row = torch.tensor(numbers, dtype=torch.float32)
    cut = row.double().clamp(-1.75 * 2.0**127, 1.75 * 2.0**127)  # float32 has no more room than that
    found = back(row, dtype).double()
    assert torch.isfinite(found).all()
    assert ((found - cut).abs() <= bound(row, dtype)).all()


@every_format
@given(numbers=a_row)
@settings(max_examples=400, deadline=None)
def test_the_scale_is_the_least_power_of_two_under_which_the_row_fits(
    dtype: torch.dtype, numbers: list[float]
) -> None:
    row = torch.tensor(numbers, dtype=torch.float32)
    elements, scale = scaled(row, dtype)
    assert scale.dtype == torch.bfloat16
    fraction, exponent = math.frexp(float(scale))
    assert fraction == 0.5
    exponent -= 1
    largest, top = float(row.abs().max()), 1.75 * 2.0 ** TOP_EXPONENTS[dtype]
    assert largest <= math.ldexp(top, exponent) or exponent == 127 - TOP_EXPONENTS[dtype]
    assert largest > math.ldexp(top, exponent - 1) or exponent == LEAST_EXPONENT
    assert torch.isfinite(elements.float()).all()


@every_format
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_read_back_is_exact_in_bfloat16_and_is_stored_as_it_was(
    dtype: torch.dtype, of: torch.dtype
) -> None:
    rows = (torch.randn(500, 4, 64) * torch.logspace(-4, 4, 500)[:, None, None]).to(of)
    elements, scales = scaled(rows, dtype)
    found = unscaled(elements, scales)
    assert torch.equal(found.bfloat16().float(), found)
    assert torch.equal(back(found, dtype), found)


@every_format
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 63])
def test_a_row_with_something_that_is_not_finite_is_nan_and_no_other_row_is(
    dtype: torch.dtype, number: float, place: int
) -> None:
    rows = torch.randn(3, 64)
    expected = back(rows, dtype)
    rows[1, place] = number
    elements, scales = scaled(rows, dtype)
    assert scales[1].isnan()
    found = unscaled(elements, scales)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@every_format
def test_a_row_of_zeros_has_the_least_scale_and_stays_zero(dtype: torch.dtype) -> None:
    elements, scale = scaled(torch.zeros(1, 64), dtype)
    assert float(scale) == 2.0**LEAST_EXPONENT
    assert not unscaled(elements, scale).any()
    assert not elements.float().any()


@every_format
def test_subnormal_numbers_are_zero_wherever_they_are_computed(dtype: torch.dtype) -> None:
    """Nobody's result depends on whether a device takes them for zero."""
    smallest = torch.tensor([2.0**-149, -(2.0**-130), 2.0**-127])
    elements, scale = scaled(smallest, dtype)
    assert not elements.float().any()
    least = 2.0 ** (LEAST_NORMAL[dtype] - SIGNIFICANT[dtype] + 1)  # the least subnormal of the format
    assert least * float(scale) >= 2.0**-126


@every_format
def test_the_largest_numbers_there_are_stay_finite(dtype: torch.dtype) -> None:
    for of in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(of).max
        found = back(torch.tensor([largest, -largest, 1.0], dtype=of), dtype)
        assert torch.isfinite(found).all()
        assert float(found[0]) == -float(found[1])
        assert float(found[0]) == pytest.approx(largest, rel=0.126)


@every_format
@given(numbers=a_row, others=a_row)
@settings(max_examples=100, deadline=None)
def test_what_is_stored_of_a_row_depends_on_that_row_alone(
    dtype: torch.dtype, numbers: list[float], others: list[float]
) -> None:
    length = min(len(numbers), len(others))
    rows = torch.tensor(np.array([numbers[:length], others[:length]]), dtype=torch.float32)
    for of_both, of_one in zip(scaled(rows, dtype), scaled(rows[:1], dtype), strict=True):
        one, same = of_both[:1].contiguous(), of_one.contiguous()
        assert torch.equal(one.view(torch.uint8), same.view(torch.uint8))


@every_format
def test_every_number_of_the_format_that_is_finite_is_stored_as_itself(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[torch.isfinite(numbers)]
    elements, scale = scaled(numbers, dtype)
    assert float(scale) == 1.0
    assert torch.equal(elements.float(), numbers)
