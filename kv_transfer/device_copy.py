"""One kernel that copies a whole batch inside a device: as fast as one contiguous copy, whatever the pieces.

A copy of the driver moves one piece at a time, and each costs a microsecond or more of the device; at 4 TB/s
a slab of 64 KiB takes 30 ns. Here a program copies 32 KiB of one piece, and all programs run at once.

The table of copies lies on the device: int64 rows of target, source and length. The grid is
(pieces, parts of the longest piece); what lies behind a piece's end does nothing. Only this module knows
triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

PART_BYTES = 32 << 10
WARPS = 8
WIDE_BYTES = 16  # of one load, where every address and length is a multiple of it
_NOT_SPECIALISED = ["table", "num_copies"]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_NOT_SPECIALISED
)
def copy_pieces(table, num_copies, WIDE: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy part `program_id(1)` of piece `program_id(0)`. `table`: its address, int64
    `[3, num_copies]`: targets, sources, lengths. `WIDE`: all three are multiples of 16."""
    row = table.to(tl.pointer_type(tl.int64)) + tl.program_id(0)
    into, source = tl.load(row), tl.load(row + num_copies)
    length = tl.load(row + 2 * num_copies)
    start = tl.program_id(1).to(tl.int64) * PART
    if start < length:
        if WIDE:
            places = start // 8 + tl.arange(0, PART // 8)
            inside = places < tl.multiple_of(length, 16) // 8
            targets = tl.multiple_of(into.to(tl.pointer_type(tl.int64)), 16) + places
            sources = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16) + places
            tl.store(targets, tl.load(sources, mask=inside), mask=inside)
        else:
            offsets = start + tl.arange(0, PART)
            within = offsets < length
            read = tl.load(source.to(tl.pointer_type(tl.uint8)) + offsets, mask=within)
            tl.store(into.to(tl.pointer_type(tl.uint8)) + offsets, read, mask=within)


def compiled(*, wide: bool) -> Callable[[int, int, int, int], None]:
    """The kernel, compiled and loaded for this thread's device: (table, copies, bytes of the longest one,
    stream). Raises what triton raises where it cannot compile: no compiler of C, no headers of Python."""
    kernel: Any = copy_pieces.warmup(1 << 40, 1, WIDE=wide, PART=PART_BYTES, grid=(1, 1), num_warps=WARPS)
    kernel._init_handles()

    def launch(table: int, num_copies: int, longest: int, stream: int) -> None:
        kernel[num_copies, -(-longest // PART_BYTES), 1](table, num_copies, wide, PART_BYTES, stream=stream)

    return launch
