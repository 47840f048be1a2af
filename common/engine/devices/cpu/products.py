"""Matrix products on the CPU: kernels of our own, or oneDNN's, and how many rows a call of either takes.

Owns how weights lie, the row plan, and the proof at load that a row of a product depends on that row alone.

`OwnProducts` (product_kernels.py) sum every row in one order, so that a step holds any rows as they come.
They are as fast as oneDNN's, but where the processor has tiles (AMX), of which only oneDNN makes use:
`OneDnnProducts`. It may choose another kernel, with another order of summation, for another number of rows;
so prompt rows always go in calls of exactly `prompt_rows`, and generated rows in calls of at most
`generated_rows` within which `settle` has seen that the number of rows makes no difference on this machine
for any of the model's shapes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cpu import product_kernels, tiles
from common.engine.devices.cpu.attention import QUERY_TILE
from common.engine.devices.rows import RowPlan
from common.errors import ConfigError

ELEMENT: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}

# The overload itself: looking it up costs microseconds at each of hundreds of calls a step.
_PRODUCT = torch.ops.mkldnn._linear_pointwise.default


class Product(Protocol):
    """A weight `[out, in]`, prepared once."""

    in_features: int
    out_features: int

    def product(self, x: Tensor) -> Tensor:
        """x `[rows, in]` → `[rows, out]`, in one call."""
        ...


class Products(Protocol):
    """`row_plan` is final after `settle`."""

    name: str  # in the numerics class
    row_plan: RowPlan
    rows_between: int  # of which a call's results stay in the cache until the next product

    def linear(self, weight: Tensor, bias: Tensor | None) -> Product: ...

    def tied_linear(self, embedding: Tensor) -> Product:
        """Of a weight that stays as it lies."""
        ...

    def settle(self) -> str:
        """Prove that rows do not depend on each other, in products of all shapes that were made; returns a
        digest of what they gave. `ConfigError` if they do."""
        ...


@dataclasses.dataclass(frozen=True, order=True)
class _Shape:
    tied: bool
    in_features: int
    out_features: int
    biased: bool

    @classmethod
    def of(cls, weight: Tensor, *, tied: bool = False, biased: bool = False) -> _Shape:
        return cls(tied, weight.shape[1], weight.shape[0], biased)


class _Packed:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = product_kernels.pack(weight), bias
        self._weight_at = self._weight.data_ptr()
        self._bias_at = 0 if bias is None else bias.data_ptr()
        self._like, self._steps = ELEMENT[weight.dtype], self._weight.shape[1]
        self._is_odd = self._steps * 4 != self.in_features * weight.element_size()

    def product(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._is_odd:
            x = F.pad(x, (0, 1))
        out = torch.empty(rows, self.out_features, dtype=x.dtype)
        product_kernels.multiply(
            x.data_ptr(),
            self._weight_at,
            self._bias_at,
            out.data_ptr(),
            rows,
            self._steps,
            self.out_features,
            tiles.PAIR_PRODUCTS,
            self._like,
        )
        return out


class _ByRows:
    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._like = weight, ELEMENT[weight.dtype]

    def product(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        product_kernels.multiply_rows(
            x.data_ptr(),
            self._weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self.in_features,
            self.out_features,
            tiles.PAIR_PRODUCTS,
            self._like,
        )
        return out


class OwnProducts:
    """Implements `Products`."""

    name = "own-1"  # another number when a change of product_kernels.py changes bits
    rows_between = 120

    def __init__(self, dtype: torch.dtype) -> None:
        self.row_plan = RowPlan(1, 1, 1, query_tile=QUERY_TILE)
        self._dtype = dtype
        self._shapes: set[_Shape] = set()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Product:
        self._shapes.add(_Shape.of(weight, biased=bias is not None))
        return _Packed(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Product:
        self._shapes.add(_Shape.of(embedding, tied=True))
        return _ByRows(embedding)

    def settle(self) -> str:
        digest = hashlib.blake2b(digest_size=6)
        rows = product_kernels.ROWS_OF_A_UNIT + 7
        for shape in sorted({_of_two_blocks(shape) for shape in self._shapes}):
            x, weight, bias = cancelling(shape, rows, self._dtype)
            linear = _ByRows(weight) if shape.tied else _Packed(weight, bias)
            whole = linear.product(x)
            for count in (1, 2, 3, 5, 8):
                if not torch.equal(linear.product(x[-count:].clone()), whole[-count:]):
                    raise _depends(rows)
            digest.update(_bytes(whole))
        return digest.hexdigest()


def _of_two_blocks(shape: _Shape) -> _Shape:
    """A shape that stands for this one in a proof. All whole blocks of columns are computed alike, so one of
    them is enough, however long the vocabulary is."""
    few = product_kernels.BLOCK + shape.out_features % product_kernels.BLOCK
    return dataclasses.replace(shape, out_features=min(shape.out_features, few))


class _OneDnn:
    """Reordered once into oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self._bias = bias

    def product(self, x: Tensor) -> Tensor:
        out: Tensor = _PRODUCT(x, self._weight, self._bias, "none", [], "")
        return out


class _Plain:
    """A head on an embedding that must stay readable by rows: oneDNN on the plain layout."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class OneDnnProducts:
    """Implements `Products`."""

    name = "onednn"

    def __init__(self, dtype: torch.dtype, prompt_rows: int = 128) -> None:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ConfigError("oneDNN has no bfloat16 products on this CPU; use dtype float32", param="dtype")
        self.row_plan = RowPlan(prompt_rows, 32, 32, query_tile=QUERY_TILE)
        self.rows_between = prompt_rows
        self._dtype = dtype
        self._shapes: set[_Shape] = set()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Product:
        self._shapes.add(_Shape.of(weight, biased=bias is not None))
        return _OneDnn(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Product:
        self._shapes.add(_Shape.of(embedding, tied=True))
        return _Plain(embedding)

    def settle(self) -> str:
        """Finds the smallest step of generated rows whose every count gives the same bits: 32 rows always
        serve, being the one exact size."""
        most = self.row_plan.generated_rows
        same = np.ones(most + 1, dtype=bool)
        digest = hashlib.blake2b(digest_size=6)
        for shape in sorted(self._shapes):
            rows, weight, bias = cancelling(shape, self.row_plan.prompt_rows, self._dtype)
            linear = _Plain(weight) if shape.tied else _OneDnn(weight, bias)
            if not shape.tied:  # a head's rows all count as generated
                digest.update(_bytes(_same_anywhere(linear, rows)))
            x = rows[:most]
            whole = linear.product(x)
            digest.update(_bytes(whole))
            for count in range(1, most):
                if same[count]:
                    last = x[most - count :].clone()  # other rows than the first, to see both
                    same[count] = torch.equal(linear.product(x[:count]), whole[:count])
                    same[count] &= torch.equal(linear.product(last), whole[most - count :])
        multiple = next(m for m in (1, 2, 4, 8, 16, 32) if same[m : most + 1 : m].all())
        self.row_plan = dataclasses.replace(self.row_plan, generated_multiple=multiple)
        return digest.hexdigest()


def _same_anywhere(linear: Product, x: Tensor) -> Tensor:
    """The product, in which a row must not depend on its place among the others."""
    whole = linear.product(x)
    if not torch.equal(linear.product(x.roll(1, 0)), whole.roll(1, 0)):
        raise _depends(len(x))
    return whole


def _depends(rows: int) -> ConfigError:
    return ConfigError(
        f"on this machine a row of a product of {rows} rows depends on the others, so that no result could "
        "be repeated; use kernels reference",
        param="kernels",
    )


def cancelling(shape: _Shape, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs `[rows, in]` and a weight whose products cancel in pairs of columns that lie anywhere, so that
    another order of summation shows in every element, not in one of thousands. A bias is as small as what
    is left, so that it matters when it is added."""
    generator = torch.Generator().manual_seed(0)
    half = shape.in_features // 2
    one, other = torch.randperm(shape.in_features, generator=generator)[: 2 * half].view(2, half)
    x = torch.zeros(rows, shape.in_features, dtype=dtype)
    weight = torch.zeros(shape.out_features, shape.in_features, dtype=dtype)
    x[:, one] = torch.randn(rows, half, generator=generator).to(dtype)
    weight[:, one] = torch.randn(shape.out_features, half, generator=generator).to(dtype)
    x[:, other], weight[:, other] = x[:, one], -weight[:, one]
    bias = None
    if shape.biased:
        bias = (torch.randn(shape.out_features, generator=generator) * 2.0**-20).to(dtype)
    return x, weight, bias


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
