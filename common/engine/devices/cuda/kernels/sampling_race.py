"""Gumbel-max over the kept tokens of a row, and what token it has in the end.

The noise of a token and the bound that spares most of it: `sampling.noise`. Scores are float64; of a score
only its logarithms may differ between devices, by an ulp each (CUDA C Programming Guide, accuracy of `log`),
so that another token may come out where two scores are closer than that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.devices.cuda.kernels.sampling_cuts import PICKS, cut_after
from common.engine.devices.cuda.kernels.sampling_values import (
    BY_SHARE,
    CHOICE,
    COUNTS,
    EDITED,
    FAULT,
    FIRST,
    GROUP,
    HOT,
    INFINITE,
    LOGPROBS,
    NO_TOKEN,
    OF_ROWS,
    PEAK,
    RACE_GROUPS,
    SCALES,
    SEED,
    STATE,
    TEMPERATURE,
    TILE_GROUPS,
    WORDS,
    bits_of,
    double_of,
    float_of,
    group_noise,
    is_kept,
    row_values,
    token_noise,
)

_PICKS = tl.constexpr(2 * PICKS)


@triton.jit
def best_of(scores, ids, SPLITS: tl.constexpr, splits):
    """(score, id) of the winner among those of a row's programs; of equal scores the lowest id."""
    split = tl.arange(0, SPLITS)
    score = tl.load(scores + split, mask=split < splits, other=-INFINITE)
    token = tl.load(ids + split, mask=split < splits, other=NO_TOKEN)
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, token, NO_TOKEN), axis=0)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def holders_kernel(
    logits,
    work,
    peaks,
    ties,
    scores,
    ids_of_scores,
    sources,
    slots,
    positions,
    records,
    state,
    cuts,
    cuts_after,
    picks,
    stride,
    vocab,
    groups,
    CAN_CUT: tl.constexpr,
    TILES: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    """The cut after top_p; the best score among the holders of their groups' least exponentials, and of the
    first token: what all others have to beat. Grid (rows, splits).

    scores float64, ids_of_scores int32 `[rows, splits]`.
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
    cut = float_of(tl.load(cuts + row * 2))
    last = tl.load(cuts + row * 2 + 1)
    if CAN_CUT:
        if tl.load(here + BY_SHARE) != 0:
            inverse = float_of(tl.load(record + SCALES))
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
                True,
                ALL_GROUPS,
            )
        if split == 0:
            tl.store(cuts_after + row * 2, bits_of(cut))
            tl.store(cuts_after + row * 2 + 1, last)

    temperature = double_of(tl.load(record + TEMPERATURE))
    seed = tl.load(record + SEED)
    choice = tl.load(record + CHOICE)
    position = tl.load(positions + row)
    top = peak.to(tl.float64)
    best = tl.full([], -INFINITE, tl.float64)
    winner = tl.full([], NO_TOKEN, tl.int32)
    if split == 0:
        first = tl.load(here + FIRST).to(tl.int32) + tl.zeros([1], tl.int32)
        least, holder = group_noise(first // GROUP, seed, choice, position)
        more = tl.where(first % GROUP == holder, 0.0, token_noise(first, seed, choice, position))
        best = tl.max(-tl.log(least + more), axis=0)
        winner = tl.max(first, axis=0)
    of_tile = tl.arange(0, TILES * TILE_GROUPS)
    group = split * (TILES * TILE_GROUPS) + of_tile
    least, holder = group_noise(group, seed, choice, position)
    ids = group * GROUP + holder
    inside = (group < groups) & (ids < vocab)
    value = row_values(raw_row, work_row, edited, ids, inside)
    runs = inside & is_kept(value, ids, cut, last)
    score = tl.where(runs, (value.to(tl.float64) - top) / temperature - tl.log(least), -INFINITE)
    most = tl.max(score, axis=0)
    token = tl.min(tl.where(runs & (score == most), ids, NO_TOKEN), axis=0)
    wins = (most > best) | ((most == best) & (token < winner))
    place = row * tl.num_programs(1) + split
    tl.store(scores + place, tl.where(wins, most, best))
    tl.store(ids_of_scores + place, tl.where(wins, token, winner))


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def race_kernel(
    logits,
    work,
    peaks,
    held_scores,
    ids_of_held,
    scores,
    ids_of_scores,
    sources,
    slots,
    positions,
    records,
    state,
    cuts,
    stride,
    vocab,
    groups,
    splits,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Draw the noise of the tokens that can still win. Grid (rows, splits). `held_*` are of the holders."""
    row = tl.program_id(0).to(tl.int64)
    here = state + row * STATE
    if tl.load(here + HOT) == 0:
        return
    split = tl.program_id(1)
    record = records + tl.load(slots + row) * WORDS
    edited = tl.load(record + EDITED).to(tl.int32)
    raw_row = logits + tl.load(sources + row) * stride
    top = float_of(tl.load(here + PEAK)).to(tl.float64)
    cut = float_of(tl.load(cuts + row * 2))
    last = tl.load(cuts + row * 2 + 1)
    temperature = double_of(tl.load(record + TEMPERATURE))
    seed = tl.load(record + SEED)
    choice = tl.load(record + CHOICE)
    position = tl.load(positions + row)
    best, winner = best_of(held_scores + row * splits, ids_of_held + row * splits, SPLITS, splits)

    of_tile = tl.arange(0, RACE_GROUPS)
    in_group = tl.arange(0, GROUP)
    for tile in range(TILES * TILE_GROUPS // RACE_GROUPS):
        group = split * (TILES * TILE_GROUPS) + tile * RACE_GROUPS + of_tile
        tops = tl.load(peaks + row * groups + group, mask=group < groups, other=-INFINITE)
        least, holder = group_noise(group, seed, choice, position)
        log_least = tl.log(least)
        may = (tops >= cut) & ((tops.to(tl.float64) - top) / temperature - log_least >= best)
        if tl.max(may.to(tl.int32), axis=0) != 0:
            ids = group[:, None] * GROUP + in_group[None, :]
            inside = ids < vocab
            value = row_values(raw_row, work + row * vocab, edited, ids, inside)
            lead = (value.to(tl.float64) - top) / temperature
            runs = inside & is_kept(value, ids, cut, last) & (lead - log_least[:, None] >= best)
            if tl.max(tl.max(runs.to(tl.int32), axis=1), axis=0) != 0:
                own = token_noise(ids, seed, choice, position)
                noise = least[:, None] + tl.where(in_group[None, :] == holder[:, None], 0.0, own)
                score = tl.where(runs, lead - tl.log(noise), -INFINITE)
                most = tl.max(tl.max(score, axis=1), axis=0)
                tied = tl.where(runs & (score == most), ids, NO_TOKEN)
                token = tl.min(tl.min(tied, axis=1), axis=0)
                wins = (most > best) | ((most == best) & (token < winner))
                best = tl.where(wins, most, best)
                winner = tl.where(wins, token, winner)
    tl.store(scores + row * splits + split, best)
    tl.store(ids_of_scores + row * splits + split, winner)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def tokens_kernel(
    scores,
    ids_of_scores,
    slots,
    records,
    state,
    targets,
    asked,
    wanted,
    tokens,
    faults,
    splits,
    IS_HOT: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """tokens int64, faults uint8, and how many logprobs are wanted, int64, -1 for none at all; each `[rows]`.

    With `HAS_TARGETS` tokens are `targets`, and `asked` logprobs of each are wanted. Grid (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    fault = tl.load(state + row * STATE + FAULT)
    token = tl.load(state + row * STATE + FIRST)
    wants = tl.full([], -1, tl.int64)
    if slot >= 0:
        if IS_HOT and tl.load(state + row * STATE + HOT) != 0:
            _, winner = best_of(scores + row * splits, ids_of_scores + row * splits, SPLITS, splits)
            token = winner.to(tl.int64)
        wants = tl.load(records + slot * WORDS + LOGPROBS)
        if HAS_TARGETS:
            token = tl.load(targets + row)
            wants = tl.load(asked + row)
        token = tl.where(fault == 0, token, -1)
        wants = tl.where(fault == 0, wants, -1)
    tl.store(tokens + row, token)
    tl.store(faults + row, fault.to(tl.uint8))
    tl.store(wanted + row, wants)


@triton.jit(do_not_specialize_on_alignment=OF_ROWS)
def append_kernel(tokens, faults, slots, drafted, draft_start, draft_length, records, addresses, vocab):
    """Count the tokens that the rows give their slots: a row's own, if the drafts before it were right.

    Row j of those that verify a slot's drafts has j drafts before it and j rows. Grid (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    place = tl.load(records + slot * WORDS + COUNTS)
    if place < 0:
        return
    start = tl.load(draft_start + row)
    drafts = tl.load(draft_length + row)
    wrong = tl.load(faults + row).to(tl.int32)
    for earlier in range(drafts):
        before = row - drafts + earlier
        wrong += (tl.load(tokens + before) != tl.load(drafted + start + earlier)).to(tl.int32)
        wrong += tl.load(faults + before).to(tl.int32)
    if wrong == 0:
        counts = tl.load(addresses).to(tl.pointer_type(tl.int32)) + place * vocab
        tl.atomic_add(counts + tl.load(tokens + row), 2, sem="relaxed")
