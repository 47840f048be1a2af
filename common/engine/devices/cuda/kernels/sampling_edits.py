"""A row's logits as the sampler sees them: edited where a sequence asks for it, and what is largest in
them."""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.sampling_values import (
    ALLOWED,
    BY_COUNT,
    BY_SHARE,
    COUNTS,
    EDITED,
    EDITS,
    FAULT,
    FIRST,
    FLOOR_KEY,
    GROUP,
    HOT,
    INFINITE,
    MASK_32,
    MIN_P_CUT,
    MIN_POSITION,
    NO_TOKEN,
    OF_ROWS,
    PEAK,
    PENALTIES,
    SCALES,
    STATE,
    STOPS,
    TEMPERATURE,
    TILE_GROUPS,
    TOP_K,
    TOP_P,
    WORDS,
    bits_of,
    descending,
    double_of,
    float_of,
    row_values,
)

NUM_BINS = 2048  # of a histogram over 11 bits
NUM_HISTOGRAMS = 3  # one for each pass
_ZEROED_AT_ONCE = tl.constexpr(1024)
_BINS_OF_ALL = tl.constexpr(NUM_BINS * NUM_HISTOGRAMS)
_EDIT_GROUPS = tl.constexpr(2)  # of a tile that is penalised: a division takes many registers
_ENTRIES = tl.constexpr(256)  # of a list that are taken at once
_BISECTIONS = tl.constexpr(32)


@triton.jit
def clear_histograms(histograms, split, splits):
    """`histograms` are a row's; its programs share the work."""
    for start in range(split * _ZEROED_AT_ONCE, _BINS_OF_ALL, splits * _ZEROED_AT_ONCE):
        place = start + tl.arange(0, _ZEROED_AT_ONCE)
        tl.store(histograms + place, tl.zeros([_ZEROED_AT_ONCE], tl.int64))


@triton.jit
def first_not_below(entries, begin, end, token):
    """Where in the ascending list `[begin, end)` the first id is that is at least `token`."""
    while begin < end:
        middle = (begin + end) // 2
        below = (tl.load(entries + middle) & MASK_32) < token
        begin = tl.where(below, middle + 1, begin)
        end = tl.where(below, end, middle)
    return begin


@triton.jit
def entries_between(entries, packed, first, end):
    """The part of a slot's list whose ids are in `[first, end)`."""
    begin = packed & MASK_32
    stop = begin + (packed >> 32)
    begin = first_not_below(entries, begin, stop, first)
    return begin, first_not_below(entries, begin, stop, end)


@triton.jit
def penalized(value, count, repetition, presence, frequency):
    """`count` is twice the number of times generated, plus one when in the prompt."""
    repeated = tl.where(value > 0.0, tl.div_rn(value, repetition), value * repetition)
    value = tl.where(count > 0, repeated, value)
    generated = count >> 1
    less = frequency * generated.to(tl.float32)
    return tl.where(generated > 0, (value - less) - presence, value)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def peaks_kernel(
    logits,
    work,
    peaks,
    raw_peaks,
    marks,
    histograms,
    slots,
    positions,
    sources,
    drafted,
    draft_start,
    draft_length,
    records,
    addresses,
    stride,
    vocab,
    groups,
    CAN_EDIT: tl.constexpr,
    CAN_CUT: tl.constexpr,
    TILES: tl.constexpr,
):
    """The largest logit of each group, and a mark for each program that saw NaN or +inf. Grid (rows, splits).

    logits `[.., vocab]` with `stride`; work float32 `[rows, vocab]`, written for edited rows; peaks and
    raw_peaks float32 `[rows, groups]`, the latter of the model's own logits, written for edited rows; marks
    int32 `[rows, splits]`; histograms int64 `[rows, NUM_HISTOGRAMS, NUM_BINS]`, zeroed where top_k needs
    them; records int64 `[slots, WORDS]`; addresses int64 `[4]`: of the counts int32 `[.., vocab]` and of the
    lists of edits, allowed ids and stop ids, whose entries have the id below and a value above 32 bits.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    record = records + slot * WORDS
    raw_row = logits + tl.load(sources + row) * stride
    work_row = work + row * vocab
    edited = 0
    allowed = 0
    is_limited = False
    if CAN_EDIT:
        edited = tl.load(record + EDITED).to(tl.int32)
        allowed = tl.load(record + ALLOWED)
        is_limited = (allowed >> 32) != 0
    if CAN_CUT and tl.load(record + TOP_K) > 0:
        clear_histograms(histograms + row * _BINS_OF_ALL, split, tl.num_programs(1))

    of_tile = tl.arange(0, TILE_GROUPS)
    in_group = tl.arange(0, GROUP)
    first_group = split * (TILES * TILE_GROUPS)
    bad = 0
    for tile in range(TILES):
        group = first_group + tile * TILE_GROUPS + of_tile
        ids = group[:, None] * GROUP + in_group[None, :]
        inside = ids < vocab
        raw = tl.load(raw_row + ids, mask=inside, other=0.0).to(tl.float32)
        is_sound = raw < INFINITE  # neither NaN
        bad |= tl.max(tl.max((~is_sound).to(tl.int32), axis=1), axis=0)
        raw = tl.where(inside & is_sound, raw, -INFINITE)
        into = peaks
        if CAN_EDIT and edited != 0:
            into = raw_peaks
            tl.store(work_row + ids, tl.where(is_limited, -INFINITE, raw), mask=inside)
        tl.store(into + row * groups + group, tl.max(raw, axis=1), mask=group < groups)

    if CAN_EDIT and edited != 0:
        first = first_group * GROUP
        end = tl.minimum(first + TILES * TILE_GROUPS * GROUP, vocab)
        entry = tl.arange(0, _ENTRIES)
        tl.debug_barrier()  # what other threads stored
        entries = tl.load(addresses + 2).to(tl.pointer_type(tl.int64))
        begin, stop = entries_between(entries, allowed, first, end)
        for start in range(begin, stop, _ENTRIES):
            here = start + entry < stop
            token = tl.load(entries + start + entry, mask=here, other=0) & MASK_32
            raw = tl.load(raw_row + token, mask=here, other=0.0).to(tl.float32)
            tl.store(work_row + token, raw, mask=here)
        tl.debug_barrier()
        entries = tl.load(addresses + 1).to(tl.pointer_type(tl.int64))
        begin, stop = entries_between(entries, tl.load(record + EDITS), first, end)
        for start in range(begin, stop, _ENTRIES):
            here = start + entry < stop
            word = tl.load(entries + start + entry, mask=here, other=0)
            token = word & MASK_32
            held = tl.load(work_row + token, mask=here, other=0.0)
            tl.store(work_row + token, held + float_of(word >> 32), mask=here)
        tl.debug_barrier()
        entries = tl.load(addresses + 3).to(tl.pointer_type(tl.int64))
        if tl.load(positions + row) < tl.load(record + MIN_POSITION):
            begin, stop = entries_between(entries, tl.load(record + STOPS), first, end)
            for start in range(begin, stop, _ENTRIES):
                here = start + entry < stop
                token = tl.load(entries + start + entry, mask=here, other=0) & MASK_32
                tl.store(work_row + token, tl.full([_ENTRIES], -INFINITE, tl.float32), mask=here)
        tl.debug_barrier()

        place = tl.load(record + COUNTS)
        counts = tl.load(addresses).to(tl.pointer_type(tl.int32)) + place * vocab
        repetition = float_of(tl.load(record + SCALES) >> 32)
        presence = float_of(tl.load(record + PENALTIES))
        frequency = float_of(tl.load(record + PENALTIES) >> 32)
        draft = tl.load(draft_start + row)
        drafts = tl.load(draft_length + row)
        of_part = tl.arange(0, _EDIT_GROUPS)
        for tile in range(TILES * TILE_GROUPS // _EDIT_GROUPS):
            group = first_group + tile * _EDIT_GROUPS + of_part
            ids = group[:, None] * GROUP + in_group[None, :]
            inside = ids < vocab
            value = tl.load(work_row + ids, mask=inside, other=-INFINITE)
            if place >= 0:
                count = tl.load(counts + ids, mask=inside, other=0)
                for earlier in range(drafts):
                    count += tl.where(ids == tl.load(drafted + draft + earlier), 2, 0)
                value = penalized(value, count, repetition, presence, frequency)
                tl.store(work_row + ids, value, mask=inside)
            is_sound = value < INFINITE
            bad |= tl.max(tl.max((~is_sound).to(tl.int32), axis=1), axis=0)
            value = tl.where(is_sound, value, -INFINITE)
            tl.store(peaks + row * groups + group, tl.max(value, axis=1), mask=group < groups)
    tl.store(marks + row * tl.num_programs(1) + split, bad)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def rows_kernel(
    logits,
    work,
    peaks,
    marks,
    slots,
    sources,
    records,
    state,
    cuts,
    stride,
    vocab,
    groups,
    splits,
    CAN_CUT: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What the peaks say of each row: its fault, its first token, the cut of min_p. Grid (rows,).

    state int64 `[rows, STATE]`; cuts int64 `[3, rows, 2]`, of which the first is written: what min_p leaves
    is `value > cut`, or equal and of an id up to `last`; `ALL_GROUPS` and `SPLITS` are powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    here = state + row * STATE
    slot = tl.load(slots + row)
    if slot < 0:
        tl.store(here + FAULT, tl.full([], 0, tl.int64))
        tl.store(here + FIRST, tl.full([], -1, tl.int64))
        tl.store(here + HOT, tl.full([], 0, tl.int64))
        tl.store(here + BY_COUNT, tl.full([], 0, tl.int64))
        tl.store(here + BY_SHARE, tl.full([], 0, tl.int64))
        return
    record = records + slot * WORDS
    split = tl.arange(0, SPLITS)
    bad = tl.max(tl.load(marks + row * splits + split, mask=split < splits, other=0), axis=0)
    group = tl.arange(0, ALL_GROUPS)
    tops = tl.load(peaks + row * groups + group, mask=group < groups, other=-INFINITE)
    peak = tl.max(tops, axis=0)
    holder = tl.min(tl.where((tops == peak) & (group < groups), group, ALL_GROUPS), axis=0)
    # with NaN among the logits no group may be equal to it; the row has a fault then
    holder = tl.minimum(holder, groups - 1)
    ids = holder * GROUP + tl.arange(0, GROUP)
    edited = tl.load(record + EDITED).to(tl.int32)
    value = row_values(logits + tl.load(sources + row) * stride, work + row * vocab, edited, ids, ids < vocab)
    first = tl.min(tl.where((value == peak) & (ids < vocab), ids, NO_TOKEN), axis=0)
    fault = tl.where(bad != 0, 1, tl.where(peak == -INFINITE, 2, 0))
    tl.store(here + FAULT, fault.to(tl.int64))
    tl.store(here + FIRST, first.to(tl.int64))
    tl.store(here + PEAK, bits_of(peak))
    is_hot = (fault == 0) & (double_of(tl.load(record + TEMPERATURE)) > 0.0)
    tl.store(here + HOT, is_hot.to(tl.int64))
    cut_below = double_of(tl.load(record + MIN_P_CUT))
    limits = cut_below > -INFINITE
    cut = tl.where(limits, (peak.to(tl.float64) + cut_below).to(tl.float32), -INFINITE)
    tl.store(cuts + row * 2, bits_of(cut))
    tl.store(cuts + row * 2 + 1, tl.where(limits, vocab, -1).to(tl.int64))
    if CAN_CUT:
        top_k = tl.load(record + TOP_K)
        by_count = is_hot & (top_k > 0) & (top_k < vocab)
        tl.store(here + BY_COUNT, by_count.to(tl.int64))
        by_share = is_hot & (double_of(tl.load(record + TOP_P)) < 1.0)
        tl.store(here + BY_SHARE, by_share.to(tl.int64))
        # The k-th largest of the peaks is no larger than the k-th largest logit.
        floor = tl.full([], MASK_32, tl.int64)
        if by_count & (top_k <= groups):
            keys = tl.where(group < groups, descending(tops), MASK_32)
            low = tl.full([], 0, tl.int64)
            for _ in range(_BISECTIONS):
                middle = (low + floor) >> 1
                enough = tl.sum((keys <= middle).to(tl.int32), axis=0) >= top_k
                floor = tl.where(enough, middle, floor)
                low = tl.where(enough, low, middle + 1)
        tl.store(here + FLOOR_KEY, floor)
