"""The product kernel, interpreted: one order of sums for each weight, whatever the rows, tiles and programs.

Tiles are smaller than on a GPU, so that a small product has many.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cuda.product_plans import Order, Shape, Tile
from common.engine.devices.cuda.product_ways import TiledWay, Workspace, silu_mul
from common.engine.devices.cuda.settling import Weight, among_strangers, same_bits

CPU = torch.device("cpu")
KINDS = [torch.bfloat16, torch.float16, torch.float32]
IN_THREE = Order(splits=3, block_k=16)
WHOLE = Order(splits=1, block_k=16)
SMALL = Tile(16, 16, 4, 1)
PARALLEL = Tile(16, 16, 4, 1, parallel=True)

Product = Callable[[Tensor], Tensor]


def weight_of(shape: Shape, dtype: torch.dtype) -> Weight:
    generator = torch.Generator().manual_seed(shape.weight_rows)
    tensor = torch.randn(shape.weight_rows, shape.in_features, generator=generator) / shape.in_features**0.5
    bias = torch.randn(shape.weight_rows, generator=generator).to(dtype) if shape.biased else None
    return Weight(shape, tensor.to(dtype), bias)


def product(weight: Weight, order: Order, tile: Tile) -> Product:
    workspace = Workspace(CPU)
    way = TiledWay(weight.shape, order, tile, 3, workspace)

    def multiply(x: Tensor) -> Tensor:
        way.reserve(len(x))
        workspace.partials.fill_(float("nan"))
        out = torch.full((len(x), weight.shape.out_features), float("nan"), dtype=x.dtype)
        way(weight, x, out)
        assert not workspace.arrived.any()
        return out

    return multiply


def some_rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)


def in_double(weight: Weight, x: Tensor) -> Tensor:
    total = x.double() @ weight.tensor.double().T
    if weight.bias is not None:
        total += weight.bias.double()
    if not weight.shape.gated:
        return total
    gate, up = total.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("shape", "order", "tile"),
    [
        (Shape(41, 100, gated=False, biased=True), IN_THREE, PARALLEL),
        (Shape(64, 96, gated=False, biased=False), IN_THREE, SMALL),
        (Shape(21, 67, gated=True, biased=True), WHOLE, SMALL),
        (Shape(1, 5, gated=False, biased=False), WHOLE, SMALL),
    ],
    ids=["odd", "even", "gated", "tiny"],
)
def test_a_product_is_what_float64_says(dtype: torch.dtype, shape: Shape, order: Order, tile: Tile) -> None:
    weight, x = weight_of(shape, dtype), some_rows(17, shape.in_features, dtype)
    got, wanted = product(weight, order, tile)(x).double(), in_double(weight, x)
    assert torch.allclose(got, wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    ("dtype", "is_gated", "order"),
    [(torch.float16, False, WHOLE), (torch.bfloat16, True, IN_THREE), (torch.float32, False, IN_THREE)],
    ids=["whole", "gated in three", "in three"],
)
def test_bits_depend_neither_on_the_number_of_rows_nor_on_the_tile(
    dtype: torch.dtype, is_gated: bool, order: Order
) -> None:
    weight = weight_of(Shape(41, 100, gated=is_gated, biased=True), dtype)
    x = some_rows(300, 100, dtype)
    wanted = product(weight, order, Tile(128, 128, 8, 1, persistent=1))(x)
    for tile, first, rows in [
        (SMALL, 0, 1),
        (SMALL, 255, 3),
        (PARALLEL, 299, 1),
        (PARALLEL, 7, 17),
        (Tile(32, 16, 4, 1, persistent=2), 100, 40),
        (Tile(64, 32, 4, 1, parallel=True), 9, 65),
        (Tile(64, 256, 4, 1), 1, 299),
    ]:
        here = slice(first, first + rows)
        assert same_bits(product(weight, order, tile)(x[here]), wanted[here]), (tile, first, rows)


@pytest.mark.usefixtures("exact_products")
def test_bits_do_depend_on_the_ranges_of_a_sum() -> None:
    """Otherwise the test above would compare nothing."""
    weight = weight_of(Shape(41, 100, gated=False, biased=False), torch.float32)
    x = some_rows(19, 100, torch.float32)
    assert not torch.equal(product(weight, WHOLE, SMALL)(x), product(weight, IN_THREE, SMALL)(x))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("tile", [SMALL, PARALLEL, Tile(16, 32, 4, 1, persistent=1)], ids=lambda t: t.name)
def test_a_row_among_nan_and_infinity_keeps_its_bits(tile: Tile) -> None:
    weight = weight_of(Shape(41, 100, gated=False, biased=True), torch.bfloat16)
    x = some_rows(21, 100, torch.bfloat16)
    multiply = product(weight, IN_THREE, tile)
    for places, strange in among_strangers(x):
        assert same_bits(multiply(strange)[places], multiply(x)[places])


@pytest.mark.usefixtures("exact_products")
def test_partial_sums_are_added_in_one_order_whoever_comes_last(request: pytest.FixtureRequest) -> None:
    weight = weight_of(Shape(41, 100, gated=False, biased=True), torch.float32)
    x = some_rows(19, 100, torch.float32)
    multiply = product(weight, IN_THREE, PARALLEL)
    forwards = multiply(x)
    request.getfixturevalue("programs_in_reverse")
    assert same_bits(multiply(x), forwards)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_gated_epilogue_is_the_activation_of_rounded_products(dtype: torch.dtype) -> None:
    weight = weight_of(Shape(21, 100, gated=True, biased=True), dtype)
    x = some_rows(19, 100, dtype)
    plain = Weight(Shape(42, 100, gated=False, biased=True), weight.tensor, weight.bias)
    wanted = torch.empty(19, 21, dtype=dtype)
    silu_mul(product(plain, IN_THREE, SMALL)(x), wanted)
    assert torch.equal(product(weight, IN_THREE, PARALLEL)(x), wanted)


def test_rows_of_x_and_of_a_weight_may_lie_apart() -> None:
    shape = Shape(41, 100, gated=False, biased=False)
    weight, x = weight_of(shape, torch.float16), some_rows(19, 100, torch.float16)
    wide, apart = torch.zeros(41, 160, dtype=x.dtype), torch.full((19, 107), float("nan"), dtype=x.dtype)
    wide[:, :100], apart[:, :100] = weight.tensor, x
    multiply = product(Weight(shape, wide[:, :100], None), IN_THREE, PARALLEL)
    assert torch.equal(multiply(apart[:, :100]), product(weight, IN_THREE, PARALLEL)(x))
