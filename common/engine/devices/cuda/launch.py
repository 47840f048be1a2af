"""How kernels are launched: what their machine code depends on is named once, for launches and proofs alike.

Owns the options under which all kernels are compiled. No product of two numbers is ever fused with the
sum that follows (`enable_fp_fusion`), for whether it is would be the compiler's choice; a `dot` says
itself how it sums. Knows no kernel, no model and no stream: a launch goes to torch's current stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import triton

OPTIONS = {"enable_fp_fusion": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel with its compile-time constants: one machine code per card and types of arguments."""

    kernel: Any  # triton.JITFunction, which has no types
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """`arguments` are the kernel's parameters that are no constants, in their order: tensors and numbers.
        Does not wait."""
        self.kernel[grid](
            *arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages, **OPTIONS
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One launch as it occurs in a model's step: what proofs compile and rooflines count.

    `types` are the arguments' in triton's words: `*bf16`, `i32`, `i64`, `fp32`. Pointers are taken to be
    aligned to 16 bytes, as torch's memory is; of numbers those named in `multiples` are multiples of 16.
    """

    name: str
    launch: Launch
    types: tuple[str, ...]
    multiples: frozenset[str] = frozenset()
    num_programs: int  # of the grid
    num_bytes: int  # read and written, each once
    flops: int = 0  # of products: two for each multiplication
    may_fuse: bool = False  # fused multiply-add in float32, as products of float32 use

    def parameters(self) -> list[str]:
        """The kernel's parameters that are no constants."""
        names: list[str] = [
            name for name in self.launch.kernel.arg_names if name not in self.launch.constants
        ]
        assert len(names) == len(self.types), f"{self.name}: types of {names}"
        return names


def power_of_two(at_least: int) -> int:
    return int(triton.next_power_of_2(at_least))
