"""Our own products: right, for sizes that fit no vector, and a row's faults are that row's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.engine.devices.cpu import product_kernels, tiles
from common.engine.devices.cpu.numba_runtime import set_num_threads
from common.engine.devices.cpu.products import OwnProducts, Product

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
SIZES = [(1, 1), (3, 9), (17, 65), (64, 64), (101, 300), (1089, 130)]  # in, out


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    set_num_threads(1)


def made(dtype: torch.dtype, width: int, columns: int, kind: str) -> tuple[Product, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(columns, width, generator=generator).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype) if kind == "biased" else None
    products = OwnProducts(dtype)
    linear = products.tied_linear(weight) if kind == "tied" else products.linear(weight, bias)
    return linear, weight, bias


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    whole = x.double() @ weight.double().T
    return whole if bias is None else whole + bias.double()


def is_close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """But for the rounding of the result, and of sums in float32."""
    right = expected(x, weight, bias)
    most = right.abs() * torch.finfo(found.dtype).eps + x.shape[1] ** 0.5 * 1e-5
    return bool(((found.double() - right).abs() <= most).all())


@every_dtype
@pytest.mark.parametrize("kind", ["plain", "biased", "tied"])
def test_products_of_any_size_are_right(dtype: torch.dtype, kind: str) -> None:
    for width, columns in SIZES:
        linear, weight, bias = made(dtype, width, columns, kind)
        for rows in (1, 2, 3, 7, 36, 41):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
            assert is_close(linear.product(x), x, weight, bias), (width, columns, rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("columns", [5, 133])
def test_sums_are_rounded_to_nearest_ties_to_even(columns: int, tied: bool) -> None:
    """In columns of whole blocks, and in those that fill none."""
    steps = torch.arange(columns, dtype=torch.float32)
    large = (1.0 + steps % 128 / 128).to(torch.bfloat16)
    small = torch.tensor([2.0**-8, 2.0**-8 + 2.0**-14, 2.0**-8 - 2.0**-14]).repeat(columns)[:columns]
    weight = torch.stack([large, small.to(torch.bfloat16)], dim=1)
    products = OwnProducts(torch.bfloat16)
    linear = products.tied_linear(weight) if tied else products.linear(weight, None)
    exact = weight.float().sum(dim=1)
    found = linear.product(torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.bfloat16))
    assert torch.equal(found, torch.stack([exact, -exact]).to(torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("kind", ["biased", "tied"])
def test_a_row_that_is_not_finite_spoils_no_other(dtype: torch.dtype, kind: str) -> None:
    linear, _, _ = made(dtype, 101, 70, kind)
    x = torch.randn(9, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = linear.product(x)
    for row, value in ((4, float("nan")), (8, float("inf"))):
        spoiled = x.clone()
        spoiled[row] = value
        found = linear.product(spoiled)
        assert not found[row].isfinite().any()
        others = [other for other in range(9) if other != row]
        assert torch.equal(found[others], right[others])


def test_a_processor_without_products_of_pairs_widens_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PAIR_PRODUCTS", ())
    for kind in ("biased", "tied"):
        linear, weight, bias = made(torch.bfloat16, 101, 70, kind)
        x = torch.randn(9, 101, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        found = linear.product(x)
        assert is_close(found, x, weight, bias)
        assert torch.equal(linear.product(x[5:6]), found[5:6])


@pytest.mark.parametrize("told", [{"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_CPU_NAME": "generic"}], ids=str)
def test_products_use_what_kernels_are_compiled_for_whatever_the_host_has(told: dict[str, str]) -> None:
    """LLVM ends a process that asks for an operation which the processor it was told of does not have."""
    script = """
from common.engine.devices.cpu import product_kernels, tiles
print(tiles.PAIR_PRODUCTS, product_kernels.VECTORS)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | told, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split("\n")[0] == "() 1"


class Storages(TorchDispatchMode):
    """Bytes of all storages that were seen, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.seen[storage.data_ptr()] = storage.nbytes()
        return found


@every_dtype
def test_a_large_weight_is_packed_with_no_other_copy_of_it(dtype: torch.dtype) -> None:
    weight = torch.zeros(100 * product_kernels.BLOCK, 32, dtype=dtype)
    with Storages() as storages:
        packed = product_kernels.pack(weight)
    assert packed.nbytes == weight.nbytes
    for known in (packed, weight):
        storages.seen.pop(known.data_ptr(), None)
    assert sum(storages.seen.values()) <= weight.nbytes / 4


def test_the_proof_at_load_needs_no_memory_for_a_whole_vocabulary() -> None:
    products, embedding = OwnProducts(torch.bfloat16), torch.zeros(100_003, 8, dtype=torch.bfloat16)
    products.tied_linear(embedding)
    products.linear(embedding, None)
    with Storages() as storages:
        products.settle()
    assert sum(storages.seen.values()) <= embedding.nbytes / 4
