"""Numba device functions of the sampler: one row's masses, cuts and winner, without a full sort.

Owns: the numba twin of the fixed-point softmax, the search for top-k and top-p cuts, the race.
Everything here works on one row of float32 logits with its maxima by groups of 256 ids (`peaks`),
which let every later pass skip most of the row.

All sums are of integers and all other reductions are maxima: no result depends on an order.
No fastmath: a fused multiply-add would break the bitwise agreement with the torch sampler.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.engine.devices.cpu.numba_runtime import bits_of_float, bits_of_floats, exact, float_of_bits
from common.engine.devices.cpu.philox import group_noise, token_noise
from common.engine.sampling.noise import GROUP, LOG_LEAST
from common.engine.sampling.softmax_mass import FLOOR, LN2_HIGH, LN2_LOW, LOG2_E, MASS_BITS, POLYNOMIAL

_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (np.float32(c) for c in POLYNOMIAL)
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(LOG2_E), np.float32(LN2_HIGH), np.float32(LN2_LOW)
_FLOOR = np.float32(FLOOR)
_ROUND = np.float32(1.5 * 2**23)  # added and subtracted: to the nearest integer, half to even
_EXPONENT = np.int32(127 + MASS_BITS)
_23, _31 = np.int32(23), np.int32(31)
_32, _MASK = np.uint64(32), np.uint64(0xFFFFFFFF)
_NEGATIVE_INFINITY = np.float32(-np.inf)
_ABSOLUTE, _INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LEAST = np.int32(-(2**31))
_NEGATIVE_INFINITY_BITS, _ZERO = np.int32(0x7F800000 - 2**31), np.int32(0)

# How far below the largest logit (in temperatures) a nucleus is looked for, before the whole row is
# taken. Changes the cost only.
_REACH_NEAR, _REACH_FAR = 4.0, 10.0

_BY_MASS, _NOT_BY_MASS = np.bool_(True), np.bool_(False)  # of one type, which True and False are not

BINS = 1024
STRIP = 32  # ids that are searched at once
_SORTABLE = 1024  # at most so many candidates are sorted


@exact
def mass(value: Any, peak: Any, inverse_temperature: Any) -> Any:
    """`floor(2**40 * exp((value - peak) * inverse_temperature))`, see `sampling.softmax_mass`."""
    x = max((value - peak) * inverse_temperature, _FLOOR)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    f = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = (((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _P0
    power = float_of_bits(np.uint32((np.int32(n) + _EXPONENT) << _23))
    return np.int64(p * power)


@exact
def tile_peak(bits: Any) -> Any:
    """(largest float as an ordered int32, largest magnitude bits) of a tile; see `find_peaks`."""
    top = _LEAST
    magnitude = _ZERO
    for i in range(bits.shape[0]):
        b = bits[i]
        # Order-preserving map of floats to signed integers (its own inverse).
        top = max(top, np.int32(b ^ np.int32(np.int32(b >> _31) & _ABSOLUTE)))
        magnitude = max(magnitude, np.int32(b & _ABSOLUTE) if b != _NEGATIVE_INFINITY_BITS else _ZERO)
    return top, magnitude


@exact
def find_peaks(bits: Any, peaks: Any) -> Any:
    """Fill the maxima of each group of 256; True when no logit is NaN or +inf.

    `bits` is the row reinterpreted as int32. Integer maxima vectorise without licence to reorder
    floats, and see every NaN.
    """
    worst = _ZERO
    for group in range(peaks.shape[0]):
        top, magnitude = tile_peak(bits[group * GROUP : group * GROUP + GROUP])
        worst = max(worst, magnitude)
        peaks[group] = float_of_bits(np.uint32(top ^ ((top >> _31) & _ABSOLUTE)))
    return worst < _INFINITY_BITS


@exact
def argmax(values: Any, peaks: Any) -> Any:
    """The lowest id of the largest logit."""
    group = 0
    for g in range(1, peaks.shape[0]):
        if peaks[g] > peaks[group]:
            group = g
    i = group * GROUP
    while values[i] != peaks[group]:
        i += 1
    return i


@exact
def largest(peaks: Any) -> Any:
    peak = peaks[0]
    for group in range(1, peaks.shape[0]):
        peak = max(peak, peaks[group])
    return peak


@exact
def tile_mass(tile: Any, peak: Any, inverse_temperature: Any, cut: Any) -> Any:
    total = np.int64(0)
    for i in range(tile.shape[0]):
        v = tile[i]
        total += mass(v, peak, inverse_temperature) if v > cut else np.int64(0)
    return total


@exact
def total_mass(values: Any, peaks: Any, peak: Any, inverse_temperature: Any, cut: Any, last: Any) -> Any:
    """Sum of masses over the tokens kept by (cut, last): `value > cut`, or equal and id <= last."""
    total = np.int64(0)
    for group in range(peaks.shape[0]):
        if peaks[group] > cut and (peaks[group] - peak) * inverse_temperature >= _FLOOR:
            tile = values[group * GROUP : group * GROUP + GROUP]
            total += tile_mass(tile, peak, inverse_temperature, cut)
    if last >= 0 and (cut - peak) * inverse_temperature >= _FLOOR:
        ties = np.int64(0)
        for group in range(peaks.shape[0]):
            if peaks[group] >= cut:
                for i in range(group * GROUP, min(group * GROUP + GROUP, last + 1, values.shape[0])):
                    ties += values[i] == cut
        total += ties * mass(cut, peak, inverse_temperature)
    return total


@exact
def reaches(tile: Any, bound: Any) -> Any:
    """Whether any of the tile is at least `bound`; without branches."""
    some = _ZERO
    for i in range(tile.shape[0]):
        some |= np.int32(tile[i] >= bound)
    return some != _ZERO


@exact
def gather(values: Any, peaks: Any, bound: Any, cut: Any, last: Any, near: Any, near_ids: Any) -> Any:
    """Compact the kept tokens of at least `bound` into `near`, in order of id; returns how many."""
    size = values.shape[0]
    bound = max(bound, cut)
    n = 0
    for group in range(peaks.shape[0]):
        if peaks[group] < bound:
            continue
        for start in range(group * GROUP, min(group * GROUP + GROUP, size), STRIP):
            strip = values[start : start + STRIP]
            if not reaches(strip, bound):
                continue
            for i in range(strip.shape[0]):
                v = strip[i]
                near[n] = v
                near_ids[n] = start + i
                n += (v >= bound) & ((v > cut) | (start + i <= last))
    return n


@exact
def sort_key(value: Any, token: Any) -> Any:
    """uint64 whose ascending order is: larger logit first, then lower id."""
    b = np.int32(bits_of_float(np.float32(value + np.float32(0.0))))  # -0.0 becomes 0.0
    ordered = np.int64(b ^ ((b >> _31) & _ABSOLUTE))
    return (np.uint64(np.int64(2**31 - 1) - ordered) << _32) | np.uint64(token)


@exact
def sort(keys: Any, count: Any) -> Any:
    """Put the first `count` keys in ascending order (Shell's sort; numpy's takes a second to compile)."""
    gap = count
    while gap > 1:
        gap = max(1, 4 * gap // 9)
        for i in range(gap, count):
            key = keys[i]
            place = i
            while place >= gap and keys[place - gap] > key:
                keys[place] = keys[place - gap]
                place -= gap
            keys[place] = key


@exact
def kth_largest(peaks: Any, k: Any, keys: Any) -> Any:
    """The k-th largest group maximum: a lower bound of the k-th largest logit; or -inf."""
    if k > peaks.shape[0]:
        return _NEGATIVE_INFINITY
    for group in range(peaks.shape[0]):
        keys[group] = sort_key(peaks[group], group)
    sort(keys, peaks.shape[0])
    return peaks[np.int64(keys[k - 1] & _MASK)]


@exact
def extent(bits: Any) -> Any:
    """(smallest, largest) float of an array reinterpreted as int32, no NaN among them."""
    low, high = _ABSOLUTE, _LEAST
    for i in range(bits.shape[0]):
        b = bits[i]
        ordered = np.int32(b ^ np.int32(np.int32(b >> _31) & _ABSOLUTE))
        low = min(low, ordered)
        high = max(high, ordered)
    low = np.int32(low ^ ((low >> _31) & _ABSOLUTE))
    high = np.int32(high ^ ((high >> _31) & _ABSOLUTE))
    return float_of_bits(np.uint32(low)), float_of_bits(np.uint32(high))


@exact
def shortest_prefix(
    near: Any,
    near_ids: Any,
    n: Any,
    target: Any,
    by_mass: Any,
    peak: Any,
    inverse_temperature: Any,
    bins: Any,
    keys: Any,
) -> Any:
    """(cut, last) of the shortest prefix, by (larger logit, lower id), that weighs `target`.

    The weight of a token is its mass, or 1. Narrows the candidates by histograms over equal
    steps of logit until few enough are left to sort; `near` is overwritten.
    """
    one = np.int64(1)
    while n > _SORTABLE:
        low, high = extent(bits_of_floats(near[:n]))
        scale = (BINS - 0.01) / (np.float64(high) - np.float64(low))
        if low == high or not scale < np.inf:
            break
        bins[:] = 0
        for j in range(n):
            weight = mass(near[j], peak, inverse_temperature) if by_mass else one
            bins[np.int64((np.float64(high) - np.float64(near[j])) * scale)] += weight
        crossing = 0
        while bins[crossing] < target:
            target -= bins[crossing]
            crossing += 1
        kept = 0
        for j in range(n):
            here = np.int64((np.float64(high) - np.float64(near[j])) * scale) == crossing
            v = near[j]
            token = near_ids[j]
            near[kept] = v
            near_ids[kept] = token
            kept += here
        if kept == n:
            break
        n = kept
    low, high = extent(bits_of_floats(near[:n]))
    if low == high:
        weight = mass(low, peak, inverse_temperature) if by_mass else one
        return low, np.int64(near_ids[(target + weight - 1) // weight - 1])
    for j in range(n):
        keys[j] = sort_key(near[j], j)
    sort(keys, n)
    found = np.int64(0)
    for place in range(n):
        found = np.int64(keys[place] & _MASK)
        target -= mass(near[found], peak, inverse_temperature) if by_mass else one
        if target <= 0:
            break
    return near[found], np.int64(near_ids[found])


@exact
def cut_of(
    values: Any,
    peaks: Any,
    peak: Any,
    temperature: Any,
    inverse_temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p_cut: Any,
    near: Any,
    near_ids: Any,
    bins: Any,
    keys: Any,
) -> Any:
    """(cut, last) after min_p, top_k, top_p: kept is `value > cut`, or equal and id <= last."""
    size = np.int64(values.shape[0])
    cut, last = _NEGATIVE_INFINITY, np.int64(-1)
    if min_p_cut > -np.inf:
        cut, last = np.float32(np.float64(peak) + min_p_cut), size
    if 0 < top_k < size:
        bound = kth_largest(peaks, top_k, keys)
        n = gather(values, peaks, bound, cut, last, near, near_ids)
        if n >= top_k:  # fewer only when min_p left fewer
            cut, last = shortest_prefix(
                near, near_ids, n, top_k, _NOT_BY_MASS, peak, inverse_temperature, bins, keys
            )
    if top_p < 1.0:
        total = total_mass(values, peaks, peak, inverse_temperature, cut, last)
        target = max(np.int64(1), min(total, np.int64(math.ceil(top_p * np.float64(total)))))
        n = 0
        for reach in (_REACH_NEAR, _REACH_FAR, np.inf):
            bound = np.float32(np.float64(peak) - reach * temperature)
            n = gather(values, peaks, bound, cut, last, near, near_ids)
            reached = tile_mass(near[:n], peak, inverse_temperature, _NEGATIVE_INFINITY)
            if reached >= target:
                break
        cut, last = shortest_prefix(
            near, near_ids, n, target, _BY_MASS, peak, inverse_temperature, bins, keys
        )
    return cut, last


@exact
def race(
    values: Any,
    peaks: Any,
    peak: Any,
    first: Any,
    temperature: Any,
    cut: Any,
    last: Any,
    seed: Any,
    choice: Any,
    position: Any,
    least: Any,
    holder: Any,
) -> Any:
    """The winner of `argmax((value - peak) / temperature - log E)` among the kept tokens.

    `first` is the argmax of the logits. Ties of the score go to the lowest id. A group is skipped
    when even its largest logit with its least exponential cannot reach the best score.
    """
    size = values.shape[0]
    k0, k1 = seed & _MASK, seed >> _32
    c1, c2 = np.uint64(position) & _MASK, np.uint64(choice) & _MASK
    top = np.float64(peak)

    smallest, offset = group_noise(first // GROUP, c1, c2, k0, k1)
    if first % GROUP != offset:
        smallest += token_noise(first, c1, c2, k0, k1)
    best, winner = -math.log(smallest), np.int64(first)

    for group in range(peaks.shape[0]):
        holder[group] = -1
        if peaks[group] < cut or (peaks[group] - top) / temperature - LOG_LEAST < best:
            continue
        smallest, offset = group_noise(group, c1, c2, k0, k1)
        least[group] = smallest
        holder[group] = offset
        i = group * GROUP + offset
        if i < size and (values[i] > cut or (values[i] == cut and i <= last)):
            score = (values[i] - top) / temperature - math.log(smallest)
            if score > best or (score == best and i < winner):
                best, winner = score, i

    for group in range(peaks.shape[0]):
        if holder[group] < 0:
            continue
        log_least = math.log(least[group])
        if (peaks[group] - top) / temperature - log_least < best:
            continue
        for i in range(group * GROUP, min(group * GROUP + GROUP, size)):
            v = values[i]
            lead = (v - top) / temperature
            if lead - log_least < best or not (v > cut or (v == cut and i <= last)):
                continue
            noise = least[group]
            if i != group * GROUP + holder[group]:
                noise += token_noise(i, c1, c2, k0, k1)
            score = lead - math.log(noise)
            if score > best or (score == best and i < winner):
                best, winner = score, np.int64(i)
    return winner
