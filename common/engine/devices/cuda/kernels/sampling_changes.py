"""What the host changed since the step before, put into the sampler's memory on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.sampling_values import WORDS


@triton.jit
def records_kernel(words, records):
    """Copy a record to its slot. `words` int64 `[n, 1 + WORDS]`, the slot first; records `[slots, WORDS]`.
    Grid (n,)."""
    source = words + tl.program_id(0).to(tl.int64) * (WORDS + 1)
    word = tl.arange(0, WORDS)
    tl.store(records + tl.load(source) * WORDS + word, tl.load(source + 1 + word))


@triton.jit
def clear_kernel(rows, counts, vocab, WIDTH: tl.constexpr):
    """Zero rows of counts `[.., vocab]`; `rows` int64 `[n]`. Grid (n, tiles)."""
    start = tl.load(rows + tl.program_id(0)) * vocab
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tl.store(counts + start + column, tl.zeros([WIDTH], tl.int32), mask=column < vocab)


@triton.jit(do_not_specialize=["number"])  # one machine code for any number
def tally_kernel(entries, number, counts, vocab, WIDTH: tl.constexpr):
    """Add to counts `[.., vocab]`; an entry int64 has (row, token, what to add) in 24, 32 and 8 bits.
    Grid (tiles,)."""
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = place < number
    entry = tl.load(entries + place, mask=inside, other=0)
    token = (entry >> 8) & 0xFFFFFFFF
    more = (entry & 0xFF).to(tl.int32)
    tl.atomic_add(counts + (entry >> 40) * vocab + token, more, mask=inside, sem="relaxed")
