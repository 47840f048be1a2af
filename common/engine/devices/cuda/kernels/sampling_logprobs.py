"""Log-probabilities under the model's own logits: of a row's token, and of the most likely ones."""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.sampling_values import (
    EDITED,
    GROUP,
    INFINITE,
    OF_ROWS,
    TILE_GROUPS,
    WORDS,
    descending,
    mass,
)
from common.engine.sampling import softmax_mass
from common.sampling import MAX_LOGPROBS

_MOST = tl.constexpr(MAX_LOGPROBS)
_PLACES = tl.constexpr(1 << (MAX_LOGPROBS - 1).bit_length())
_SCALE = tl.constexpr(softmax_mass.MASS_BITS * 0.6931471805599453)
_NO_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def place_key(value, ids):
    """int64 that is the smaller the earlier a token comes, by (larger logit, lower id)."""
    return ((descending(value) - 0x80000000) << 32) | ids.to(tl.int64)


@triton.jit
def own_peaks(peaks, raw_peaks, slots, records, row, groups, ALL_GROUPS: tl.constexpr):
    """Of each group, the largest of the model's own logits."""
    edited = tl.load(records + tl.load(slots + row) * WORDS + EDITED) != 0
    group = tl.arange(0, ALL_GROUPS)
    own = tl.load(peaks + row * groups + group, mask=(group < groups) & ~edited, other=-INFINITE)
    raw = tl.load(raw_peaks + row * groups + group, mask=(group < groups) & edited, other=-INFINITE)
    return tl.maximum(own, raw)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def ranks_kernel(
    logits,
    peaks,
    raw_peaks,
    sources,
    slots,
    records,
    tokens,
    wanted,
    totals,
    befores,
    stride,
    vocab,
    groups,
    TILES: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    """What each program's tokens weigh at temperature 1, and how many come before the row's token, by (larger
    logit, lower id). Grid (rows, splits).

    tokens, wanted `[rows]`; totals, befores int64 `[rows, splits]`.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + row) < 0:
        return
    split = tl.program_id(1)
    raw_row = logits + tl.load(sources + row) * stride
    peak = tl.max(own_peaks(peaks, raw_peaks, slots, records, row, groups, ALL_GROUPS), axis=0)
    token = tl.load(tokens + row)
    value = tl.load(raw_row + token).to(tl.float32)
    total = tl.full([], 0, tl.int64)
    before = tl.full([], 0, tl.int64)
    of_tile = tl.arange(0, TILE_GROUPS)
    in_group = tl.arange(0, GROUP)
    for tile in range(TILES):
        group = split * (TILES * TILE_GROUPS) + tile * TILE_GROUPS + of_tile
        ids = group[:, None] * GROUP + in_group[None, :]
        inside = ids < vocab
        other = tl.load(raw_row + ids, mask=inside, other=0.0).to(tl.float32)
        weight = tl.where(inside, mass(other, peak, 1.0), 0)
        total += tl.sum(tl.sum(weight, axis=1), axis=0)
        precedes = inside & ((other > value) | ((other == value) & (ids < token)))
        before += tl.sum(tl.sum(precedes.to(tl.int32), axis=1), axis=0)
    tl.store(totals + row * tl.num_programs(1) + split, total)
    tl.store(befores + row * tl.num_programs(1) + split, before)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def logprobs_kernel(
    logits,
    peaks,
    raw_peaks,
    sources,
    slots,
    records,
    tokens,
    wanted,
    totals,
    befores,
    chosen,
    ranks,
    top_ids,
    top,
    stride,
    vocab,
    groups,
    splits,
    ALL_GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """chosen float32, ranks int64 `[rows]`, top_ids int64 and top float32 `[rows, MAX_LOGPROBS]`, as
    `Logprobs` has them. Grid (rows,).

    The most likely tokens come one by one, each from the group whose next one is the first of all groups'.
    """
    row = tl.program_id(0).to(tl.int64)
    want = tl.load(wanted + row)
    place = tl.arange(0, _PLACES)
    found_ids = tl.full([_PLACES], -1, tl.int64)
    found = tl.full([_PLACES], float("nan"), tl.float32)
    logprob = tl.full([], float("nan"), tl.float32)
    rank = tl.full([], 0, tl.int64)
    if want >= 0:
        raw_row = logits + tl.load(sources + row) * stride
        split = tl.arange(0, SPLITS)
        total = tl.sum(tl.load(totals + row * splits + split, mask=split < splits, other=0), axis=0)
        rank = 1 + tl.sum(tl.load(befores + row * splits + split, mask=split < splits, other=0), axis=0)
        log_total = tl.log(total.to(tl.float64)) - _SCALE
        tops = own_peaks(peaks, raw_peaks, slots, records, row, groups, ALL_GROUPS)
        peak = tl.max(tops, axis=0).to(tl.float64)
        value = tl.load(raw_row + tl.load(tokens + row)).to(tl.float64)
        logprob = (value - peak - log_total).to(tl.float32)
        # The key of the next of each group, in which the id is at first the group's lowest.
        group = tl.arange(0, ALL_GROUPS)
        coming = place_key(tops, group * GROUP)
        coming = tl.where(tops > -INFINITE, coming, _NO_KEY)
        for number in range(tl.minimum(want, _MOST)):
            next_key = tl.min(coming, axis=0)
            if next_key != _NO_KEY:
                holder = tl.min(tl.where(coming == next_key, group, ALL_GROUPS), axis=0)
                ids = holder * GROUP + tl.arange(0, GROUP)
                other = tl.load(raw_row + ids, mask=ids < vocab, other=0.0).to(tl.float32)
                keys = place_key(other, ids)
                keys = tl.where((ids < vocab) & (other > -INFINITE) & (keys >= next_key), keys, _NO_KEY)
                first = tl.min(keys, axis=0)
                after = tl.min(tl.where(keys > first, keys, _NO_KEY), axis=0)
                coming = tl.where(group == holder, after, coming)
                score = tl.max(tl.where(keys == first, other, -INFINITE), axis=0).to(tl.float64)
                found_ids = tl.where(place == number, first & 0xFFFFFFFF, found_ids)
                found = tl.where(place == number, (score - peak - log_total).to(tl.float32), found)
    tl.store(chosen + row, logprob)
    tl.store(ranks + row, rank)
    tl.store(top_ids + row * _MOST + place, found_ids, mask=place < _MOST)
    tl.store(top + row * _MOST + place, found, mask=place < _MOST)
