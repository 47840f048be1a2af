"""Which tokens of a row top_k and top_p leave: the shortest prefix, by (larger logit, lower id), of some
weight.

The weight of a token is 1, or its mass. Three passes narrow the descending key of the prefix's last logit by
11, 11 and 10 bits, each with a histogram of the weights of what is left; integers, so that their order does
not show. What remains is told by the ids of equal logits: their number is counted by group. Radix selection:
Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012.

A pass begins with what the one before it found, which every program of a row finds for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.sampling_edits import NUM_BINS, NUM_HISTOGRAMS, clear_histograms
from common.engine.devices.cuda.kernels.sampling_values import (
    BY_COUNT,
    BY_SHARE,
    EDITED,
    FLOOR_KEY,
    GROUP,
    HOT,
    INFINITE,
    MASK_32,
    OF_ROWS,
    PEAK,
    SCALES,
    STATE,
    TILE_GROUPS,
    TOP_K,
    TOP_P,
    WORDS,
    bits_of,
    descending,
    double_of,
    float_of,
    is_kept,
    mass,
    row_values,
    value_of,
)

PICKS = 4  # of a selection: before the second and third pass, before ties are counted, and that there is one
_BINS = tl.constexpr(NUM_BINS)
_BINS_OF_ALL = tl.constexpr(NUM_BINS * NUM_HISTOGRAMS)
_PICKS = tl.constexpr(2 * PICKS)  # words of a selection
_MASS_BITS = tl.constexpr(40)
_LN2 = tl.constexpr(0.6931471805599453)
_SLACK = tl.constexpr(1e-3)  # in units of the exponent: far more than masses are wrong by


@triton.jit
def crossing(histogram, target):
    """(bin in which the running weight reaches `target`, what of it that bin has to give); no bin:
    `_BINS`."""
    sums = tl.cumsum(tl.load(histogram + tl.arange(0, _BINS)), axis=0)
    short = sums < target
    return tl.sum(short.to(tl.int32), axis=0), target - tl.max(tl.where(short, sums, 0), axis=0)


@triton.jit
def mass_target(totals, splits, top_p, SPLITS: tl.constexpr):
    """The mass that a row's nucleus reaches, and the mass of all that are left."""
    split = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(totals + split, mask=split < splits, other=0), axis=0)
    wanted = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(wanted, total), 1), total


@triton.jit
def light_key(spare, vocab, peak, inverse_temperature):
    """Descending key such that all tokens of larger keys together weigh less than `spare`."""
    key = tl.full([], MASK_32, tl.int64)
    each = spare // vocab
    if each > 0:
        exponent = (each.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023 - _MASS_BITS
        depth = (exponent.to(tl.float64) * _LN2 - _SLACK) / inverse_temperature.to(tl.float64)
        bound = (peak.to(tl.float64) + depth).to(tl.float32)
        key = descending(bound) + 1  # the bound was rounded
    return key


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def weigh_kernel(
    logits,
    work,
    peaks,
    totals,
    histograms,
    sources,
    slots,
    records,
    state,
    cuts,
    picks,
    stride,
    vocab,
    groups,
    splits,
    BY_MASS: tl.constexpr,
    PASS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One pass of a selection: a histogram of the weights that the pass before left. Grid (rows, splits).

    cuts `[rows, 2]` are those before the selection; picks int64 `[rows, PICKS, 2]`: the prefix of the key
    after a pass, -1 where nothing is to be cut, and the weight that is still to be found.
    """
    row = tl.program_id(0).to(tl.int64)
    here = state + row * STATE
    if tl.load(here + (BY_SHARE if BY_MASS else BY_COUNT)) == 0:
        return
    split = tl.program_id(1)
    record = records + tl.load(slots + row) * WORDS
    peak = float_of(tl.load(here + PEAK))
    inverse = float_of(tl.load(record + SCALES))
    cut = float_of(tl.load(cuts + row * 2))
    last = tl.load(cuts + row * 2 + 1)
    histogram = histograms + row * _BINS_OF_ALL
    pick = picks + row * _PICKS

    most = tl.full([], MASK_32, tl.int64)  # no larger key is looked at
    prefix = tl.full([], 0, tl.int64)
    if PASS == 0:
        if BY_MASS:
            target, total = mass_target(
                totals + row * splits, splits, double_of(tl.load(record + TOP_P)), SPLITS
            )
            most = light_key(total - target, vocab, peak, inverse)
        else:
            target = tl.load(record + TOP_K)
            most = tl.load(here + FLOOR_KEY)
        if split == 0:
            tl.store(pick, prefix)
            tl.store(pick + 1, target)
    else:
        prefix = tl.load(pick + (PASS - 1) * 2)
        if prefix >= 0:
            found, rest = crossing(histogram + (PASS - 1) * _BINS, tl.load(pick + (PASS - 1) * 2 + 1))
            prefix = tl.where(found < _BINS, prefix * _BINS + found, -1)
            if split == 0:
                tl.store(pick + PASS * 2 + 1, rest)
        if split == 0:
            tl.store(pick + PASS * 2, prefix)
        most = ((prefix + 1) << (21 if PASS == 1 else 10)) - 1
    if prefix < 0:
        return

    edited = tl.load(record + EDITED).to(tl.int32)
    raw_row = logits + tl.load(sources + row) * stride
    of_tile = tl.arange(0, TILE_GROUPS)
    in_group = tl.arange(0, GROUP)
    for tile in range(TILES):
        group = split * (TILES * TILE_GROUPS) + tile * TILE_GROUPS + of_tile
        tops = tl.load(peaks + row * groups + group, mask=group < groups, other=-INFINITE)
        if tl.min(descending(tops), axis=0) <= most:
            ids = group[:, None] * GROUP + in_group[None, :]
            inside = ids < vocab
            value = row_values(raw_row, work + row * vocab, edited, ids, inside)
            key = descending(value)
            counts = inside & is_kept(value, ids, cut, last) & (key <= most)
            if PASS == 0:
                place = key >> 21
            elif PASS == 1:
                counts = counts & ((key >> 21) == prefix)
                place = (key >> 10) & (_BINS - 1)
            else:
                counts = counts & ((key >> 10) == prefix)
                place = key & (_BINS // 2 - 1)
            if BY_MASS:
                weight = mass(value, peak, inverse)
                counts = counts & (weight > 0)
            else:
                weight = tl.full([TILE_GROUPS, GROUP], 1, tl.int64)
            tl.atomic_add(histogram + PASS * _BINS + place, weight, mask=counts, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def ties_kernel(
    logits,
    work,
    peaks,
    ties,
    histograms,
    sources,
    slots,
    records,
    state,
    cuts,
    picks,
    stride,
    vocab,
    groups,
    BY_MASS: tl.constexpr,
    TILES: tl.constexpr,
):
    """How many kept tokens of each group have the logit at which the selection ends. Grid (rows, splits).

    ties int32 `[rows, groups]`; the others as in `weigh_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    here = state + row * STATE
    if tl.load(here + (BY_SHARE if BY_MASS else BY_COUNT)) == 0:
        return
    split = tl.program_id(1)
    pick = picks + row * _PICKS
    key = tl.load(pick + 4)
    if key >= 0:
        found, rest = crossing(histograms + row * _BINS_OF_ALL + 2 * _BINS, tl.load(pick + 5))
        key = key * (_BINS // 2) + found
        if split == 0:
            tl.store(pick + 7, rest)
    if split == 0:
        tl.store(pick + 6, key)
    if key < 0:
        return
    record = records + tl.load(slots + row) * WORDS
    edited = tl.load(record + EDITED).to(tl.int32)
    raw_row = logits + tl.load(sources + row) * stride
    cut = float_of(tl.load(cuts + row * 2))
    last = tl.load(cuts + row * 2 + 1)
    of_tile = tl.arange(0, TILE_GROUPS)
    in_group = tl.arange(0, GROUP)
    for tile in range(TILES):
        group = split * (TILES * TILE_GROUPS) + tile * TILE_GROUPS + of_tile
        tops = tl.load(peaks + row * groups + group, mask=group < groups, other=-INFINITE)
        number = tl.zeros([TILE_GROUPS], tl.int32)
        if tl.min(descending(tops), axis=0) <= key:
            ids = group[:, None] * GROUP + in_group[None, :]
            inside = ids < vocab
            value = row_values(raw_row, work + row * vocab, edited, ids, inside)
            tied = inside & is_kept(value, ids, cut, last) & (descending(value) == key)
            number = tl.sum(tied.to(tl.int32), axis=1)
        tl.store(ties + row * groups + group, number, mask=group < groups)


@triton.jit
def cut_after(
    raw_row,
    work_row,
    edited,
    ties,
    pick,
    cut,
    last,
    peak,
    inverse,
    vocab,
    groups,
    BY_MASS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    """(cut, last) after a selection, of those before it; pointers are to what is the row's."""
    key = tl.load(pick + 6)
    if key >= 0:
        end = value_of(key)
        needed = tl.load(pick + 7)
        if BY_MASS:
            weight = mass(end, peak, inverse)
            needed = (needed + weight - 1) // weight
        group = tl.arange(0, ALL_GROUPS)
        sums = tl.cumsum(tl.load(ties + group, mask=group < groups, other=0), axis=0)
        short = sums < needed
        holder = tl.sum(short.to(tl.int32), axis=0)
        needed -= tl.max(tl.where(short, sums, 0), axis=0)
        ids = holder * GROUP + tl.arange(0, GROUP)
        inside = ids < vocab
        value = row_values(raw_row, work_row, edited, ids, inside)
        tied = inside & is_kept(value, ids, cut, last) & (descending(value) == key)
        before = tl.cumsum(tied.to(tl.int32), axis=0)
        last = tl.sum(tl.where(tied & (before == needed), ids, 0), axis=0).to(tl.int64)
        cut = end
    return cut, last


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def totals_kernel(
    logits,
    work,
    peaks,
    ties,
    totals,
    histograms,
    sources,
    slots,
    records,
    state,
    cuts,
    cuts_after,
    picks,
    stride,
    vocab,
    groups,
    TILES: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    """The cut after top_k, and the mass that each program's tokens have under it. Grid (rows, splits).

    totals int64 `[rows, splits]`; histograms are zeroed where top_p needs them; cuts_after `[rows, 2]`.
    """
    row = tl.program_id(0).to(tl.int64)
    here = state + row * STATE
    if tl.load(here + HOT) == 0:
        return
    split = tl.program_id(1)
    record = records + tl.load(slots + row) * WORDS
    edited = tl.load(record + EDITED).to(tl.int32)
    raw_row = logits + tl.load(sources + row) * stride
    work_row = work + row * vocab
    peak = float_of(tl.load(here + PEAK))
    inverse = float_of(tl.load(record + SCALES))
    cut = float_of(tl.load(cuts + row * 2))
    last = tl.load(cuts + row * 2 + 1)
    if tl.load(here + BY_COUNT) != 0:
        cut, last = cut_after(
            raw_row,
            work_row,
            edited,
            ties + row * groups,
            picks + row * _PICKS,
            cut,
            last,
            peak,
            inverse,
            vocab,
            groups,
            False,
            ALL_GROUPS,
        )
    if split == 0:
        tl.store(cuts_after + row * 2, bits_of(cut))
        tl.store(cuts_after + row * 2 + 1, last)
    if tl.load(here + BY_SHARE) == 0:
        return
    clear_histograms(histograms + row * _BINS_OF_ALL, split, tl.num_programs(1))
    total = tl.full([], 0, tl.int64)
    of_tile = tl.arange(0, TILE_GROUPS)
    in_group = tl.arange(0, GROUP)
    for tile in range(TILES):
        group = split * (TILES * TILE_GROUPS) + tile * TILE_GROUPS + of_tile
        tops = tl.load(peaks + row * groups + group, mask=group < groups, other=-INFINITE)
        # masses of what lies further down are 0
        if tl.max(((tops >= cut) & (mass(tops, peak, inverse) > 0)).to(tl.int32), axis=0) != 0:
            ids = group[:, None] * GROUP + in_group[None, :]
            inside = ids < vocab
            value = row_values(raw_row, work_row, edited, ids, inside)
            weight = tl.where(inside & is_kept(value, ids, cut, last), mass(value, peak, inverse), 0)
            total += tl.sum(tl.sum(weight, axis=1), axis=0)
    tl.store(totals + row * tl.num_programs(1) + split, total)
