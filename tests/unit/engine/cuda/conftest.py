"""What tests of GPU kernels may name."""

from __future__ import annotations

from tests.support.triton_interpreter import exact_products, programs_in_reverse

__all__ = ["exact_products", "programs_in_reverse"]
