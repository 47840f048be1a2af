"""Kernels run by triton's interpreter, with a product whose bits do not depend on how large its tile is.

The interpreter multiplies by NumPy, whose order of summation depends on the shapes. Here a tile is summed in
float64 and rounded once: what is left of the order is that of the tiles, which is the kernel's own. So tests
compare launches of different shapes bit for bit, as a GPU is compared.

Whoever imports this can also interpret kernels by triton 3.6 whose loops end at a number that they computed:
its interpreter makes a Python number of an array of one element, which NumPy allows no longer; 3.7 does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(self: object, a: object, b: object, total: object, *precision: object) -> object:
        with np.errstate(invalid="ignore"):  # of rows that are NaN or infinite
            wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))  # type: ignore[attr-defined]
            summed = total.data + wide.astype(total.data.dtype)  # type: ignore[attr-defined]
        return interpreter.TensorHandle(summed, total.dtype.scalar)  # type: ignore[attr-defined]

    monkeypatch.setattr(BUILDER, "create_dot", create_dot)


@pytest.fixture
def programs_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a launch runs first."""

    def set_grid_idx(self: object, x: int, y: int, z: int) -> None:
        dim = self.grid_dim  # type: ignore[attr-defined]
        self.grid_idx = (dim[0] - 1 - x, dim[1] - 1 - y, dim[2] - 1 - z)  # type: ignore[attr-defined]

    monkeypatch.setattr(BUILDER, "set_grid_idx", set_grid_idx)
