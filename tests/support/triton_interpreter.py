"""Kernels run by triton's interpreter, with a product whose bits do not depend on how large its tile is.

The interpreter multiplies by NumPy, whose order of summation depends on the shapes. Here a tile is summed in
float64 and rounded once: what is left of the order is that of the tiles, which is the kernel's own. So tests
compare launches of different shapes bit for bit, as a GPU is compared.
"""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(self: object, a: object, b: object, total: object, *precision: object) -> object:
        wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))  # type: ignore[attr-defined]
        summed = total.data + wide.astype(total.data.dtype)  # type: ignore[attr-defined]
        return interpreter.TensorHandle(summed, total.dtype.scalar)  # type: ignore[attr-defined]

    monkeypatch.setattr(BUILDER, "create_dot", create_dot)
