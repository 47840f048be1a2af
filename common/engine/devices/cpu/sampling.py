"""The sampler on CPU: numba kernels over the rows of a step.

Owns: the order of stages within a row and the scratch memory. Imported only when the device is a
CPU, so that a CUDA machine needs no numba. One row is the work of one thread from its first pass
to its token (a row stays in that core's cache), and rows are dealt to threads in turn; since a
row uses nothing but its own scratch, results cannot depend on other rows or the thread count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.cpu.numba_runtime import bits_of_floats, exact, exact_kernel
from common.engine.devices.cpu.selection import (
    BINS,
    argmax,
    cut_of,
    find_peaks,
    gather,
    kth_largest,
    largest,
    race,
    sort,
    sort_key,
    total_mass,
)
from common.engine.sampling.noise import GROUP
from common.engine.sampling.records import Logprobs, SampleOutput, SampleRows
from common.engine.sampling.slots import SlotTable
from common.engine.sampling.softmax_mass import MASS_BITS

_OK, _NOT_FINITE, _NO_TOKEN_LEFT = np.uint8(0), np.uint8(1), np.uint8(2)
_NEGATIVE_INFINITY = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_MASK = np.uint64(0xFFFFFFFF)
_16 = np.int32(16)


class Scratch(NamedTuple):
    """Memory of the threads; `[threads, ...]`. Nothing in it outlives a row."""

    raw: NDArray[np.float32]  # [threads, vocab] a bf16 row widened
    work: NDArray[np.float32]  # [threads, vocab] a row with edits and penalties
    near: NDArray[np.float32]  # [threads, vocab] gathered candidates
    near_ids: NDArray[np.int32]  # [threads, vocab]
    keys: NDArray[np.uint64]  # [threads, vocab]
    bins: NDArray[np.int64]  # [threads, BINS]
    raw_peaks: NDArray[np.float32]  # [threads, groups]
    work_peaks: NDArray[np.float32]  # [threads, groups]
    least: NDArray[np.float64]  # [threads, groups]
    holder: NDArray[np.int64]  # [threads, groups]


def make_scratch(vocab_size: int, threads: int) -> Scratch:
    groups = -(-vocab_size // GROUP)
    row, peaks = (threads, vocab_size), (threads, groups)
    return Scratch(
        raw=np.empty(row, np.float32),
        work=np.empty(row, np.float32),
        near=np.empty(row, np.float32),
        near_ids=np.empty(row, np.int32),
        keys=np.empty(row, np.uint64),
        bins=np.empty((threads, BINS), np.int64),
        raw_peaks=np.empty(peaks, np.float32),
        work_peaks=np.empty(peaks, np.float32),
        least=np.empty(peaks, np.float64),
        holder=np.empty(peaks, np.int64),
    )


def float_and_half_views(logits: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """The logits as float32, or as the bits of bfloat16; the other of the two has no rows."""
    vocab = logits.shape[1]
    if logits.dtype == torch.bfloat16:
        half = logits.contiguous().view(torch.int16).numpy().view(np.uint16)
        return np.empty((0, vocab), np.float32), half
    return logits.contiguous().numpy(), np.empty((0, vocab), np.uint16)


@exact
def widen(half: Any, bits: Any) -> Any:
    """bfloat16 bits to the int32 bits of the same float32."""
    for i in range(half.shape[0]):
        bits[i] = np.int32(half[i]) << _16


@exact
def penalized(value: Any, count: Any, record: Any) -> Any:
    """`count` is twice the number of times generated, plus one when in the prompt."""
    if count == 0:
        return value
    value = value / record.repetition if value > _ZERO else value * record.repetition
    generated = count >> 1
    if generated:
        value = value - record.frequency * np.float32(generated)
        value = value - record.presence
    return value


@exact
def edit(
    raw: Any,
    work: Any,
    record: Any,
    position: Any,
    drafted: Any,
    edit_ids: Any,
    edit_values: Any,
    allowed_ids: Any,
    stop_ids: Any,
    counts: Any,
    seen: Any,
    seen_length: Any,
) -> Any:
    """`work` becomes the row with bias, allowed and banned ids, min_tokens and penalties."""
    for i in range(raw.shape[0]):
        work[i] = _NEGATIVE_INFINITY if record.allowed_length else raw[i]
    if record.allowed_length:
        for j in range(record.allowed_start, record.allowed_start + record.allowed_length):
            work[allowed_ids[j]] = raw[allowed_ids[j]]
    for j in range(record.edits_start, record.edits_start + record.edits_length):
        work[edit_ids[j]] += edit_values[j]
    if position < record.min_position:
        for j in range(record.stops_start, record.stops_start + record.stops_length):
            work[stop_ids[j]] = _NEGATIVE_INFINITY
    if record.counts < 0:
        return
    tally = counts[record.counts]
    # The drafted prefix counts as generated; lend it to the tally for this row: two rows of one
    # sequence may be in two threads, so the tally itself must not change.
    final = np.empty(drafted.shape[0], np.float32)
    for j in range(drafted.shape[0]):
        extra = 0
        for other in drafted:
            extra += other == drafted[j]
        final[j] = penalized(work[drafted[j]], tally[drafted[j]] + 2 * extra, record)
    for j in range(seen_length[record.counts]):
        token = seen[record.counts, j]
        work[token] = penalized(work[token], tally[token], record)
    for j in range(drafted.shape[0]):
        work[drafted[j]] = final[j]


@exact
def row_logprobs(
    values: Any,
    peaks: Any,
    peak: Any,
    target: Any,
    count: Any,
    near: Any,
    near_ids: Any,
    keys: Any,
    bins: Any,
    row: Any,
    chosen: Any,
    ranks: Any,
    top_ids: Any,
    top: Any,
) -> Any:
    """Log-probability and rank of `target` and of the `count` most likely tokens."""
    everything = np.int64(-1)
    total = total_mass(values, peaks, peak, _ONE, _NEGATIVE_INFINITY, everything)
    log_total = math.log(np.float64(total)) - MASS_BITS * math.log(2.0)
    value = values[target]
    chosen[row] = np.float64(value) - np.float64(peak) - log_total
    rank = 1
    for group in range(peaks.shape[0]):
        if peaks[group] < value:
            continue
        for i in range(group * GROUP, min(group * GROUP + GROUP, values.shape[0])):
            v = values[i]
            rank += (v > value) | ((v == value) & (i < target))
    ranks[row] = rank
    if count == 0:
        return
    bound = kth_largest(peaks, count, keys)
    n = gather(values, peaks, bound, _NEGATIVE_INFINITY, np.int64(-1), near, near_ids)
    for j in range(n):
        keys[j] = sort_key(near[j], j)
    sort(keys, n)
    for place in range(min(n, count)):
        found = np.int64(keys[place] & _MASK)
        top_ids[row, place] = near_ids[found]
        top[row, place] = np.float64(near[found]) - np.float64(peak) - log_total


@exact
def sample_lane(
    lane: Any,
    logits: Any,
    half: Any,
    sources: Any,
    slots: Any,
    positions: Any,
    drafted: Any,
    draft_start: Any,
    draft_length: Any,
    records: Any,
    edit_ids: Any,
    edit_values: Any,
    allowed_ids: Any,
    stop_ids: Any,
    counts: Any,
    seen: Any,
    seen_length: Any,
    scratch: Any,
    tokens: Any,
    faults: Any,
    chosen: Any,
    ranks: Any,
    top_ids: Any,
    top: Any,
) -> Any:
    """The rows that are one thread's. Apart from the loop over threads, which numba compiles twice."""
    lanes = scratch.raw.shape[0]
    near, near_ids = scratch.near[lane], scratch.near_ids[lane]
    keys, bins = scratch.keys[lane], scratch.bins[lane]
    for row in range(lane, slots.shape[0], lanes):
        record = records[slots[row]]
        raw = scratch.raw[lane]
        if half.shape[0]:
            widen(half[sources[row]], bits_of_floats(raw))
        else:
            raw = logits[sources[row]]
        raw_peaks = scratch.raw_peaks[lane]
        tokens[row] = -1
        faults[row] = _NOT_FINITE
        if not find_peaks(bits_of_floats(raw), raw_peaks):
            continue
        values, peaks = raw, raw_peaks
        if record.edited:
            values, peaks = scratch.work[lane], scratch.work_peaks[lane]
            start = draft_start[row]
            edit(
                raw,
                values,
                record,
                positions[row],
                drafted[start : start + draft_length[row]],
                edit_ids,
                edit_values,
                allowed_ids,
                stop_ids,
                counts,
                seen,
                seen_length,
            )
            if not find_peaks(bits_of_floats(values), peaks):
                continue
        faults[row] = _NO_TOKEN_LEFT
        first = argmax(values, peaks)
        peak = values[first]
        if peak == _NEGATIVE_INFINITY:
            continue
        faults[row] = _OK
        token = first
        if record.temperature > 0.0:
            cut, last = cut_of(
                values,
                peaks,
                peak,
                record.temperature,
                record.inverse_temperature,
                record.top_k,
                record.top_p,
                record.min_p_cut,
                near,
                near_ids,
                bins,
                keys,
            )
            token = race(
                values,
                peaks,
                peak,
                first,
                record.temperature,
                cut,
                last,
                record.seed,
                record.choice,
                positions[row],
                scratch.least[lane],
                scratch.holder[lane],
            )
        tokens[row] = token
        if record.logprobs >= 0:
            row_logprobs(
                raw,
                raw_peaks,
                largest(raw_peaks),
                token,
                record.logprobs,
                near,
                near_ids,
                keys,
                bins,
                row,
                chosen,
                ranks,
                top_ids,
                top,
            )


@exact_kernel
def sample_rows(
    logits: Any,
    half: Any,
    sources: Any,
    slots: Any,
    positions: Any,
    drafted: Any,
    draft_start: Any,
    draft_length: Any,
    records: Any,
    edit_ids: Any,
    edit_values: Any,
    allowed_ids: Any,
    stop_ids: Any,
    counts: Any,
    seen: Any,
    seen_length: Any,
    scratch: Any,
    tokens: Any,
    faults: Any,
    chosen: Any,
    ranks: Any,
    top_ids: Any,
    top: Any,
) -> Any:
    """Fill `tokens` and `faults` (and the logprobs of the rows that want them)."""
    for lane in numba.prange(scratch.raw.shape[0]):
        sample_lane(
            np.int64(lane),
            logits,
            half,
            sources,
            slots,
            positions,
            drafted,
            draft_start,
            draft_length,
            records,
            edit_ids,
            edit_values,
            allowed_ids,
            stop_ids,
            counts,
            seen,
            seen_length,
            scratch,
            tokens,
            faults,
            chosen,
            ranks,
            top_ids,
            top,
        )


@exact
def score_lane(
    lane: Any,
    logits: Any,
    half: Any,
    targets: Any,
    counts: Any,
    scratch: Any,
    faults: Any,
    chosen: Any,
    ranks: Any,
    top_ids: Any,
    top: Any,
) -> Any:
    """The rows that are one thread's."""
    lanes = scratch.raw.shape[0]
    for row in range(lane, targets.shape[0], lanes):
        raw = scratch.raw[lane]
        if half.shape[0]:
            widen(half[row], bits_of_floats(raw))
        else:
            raw = logits[row]
        peaks = scratch.raw_peaks[lane]
        faults[row] = _NOT_FINITE
        if not find_peaks(bits_of_floats(raw), peaks):
            continue
        faults[row] = _NO_TOKEN_LEFT
        peak = largest(peaks)
        if peak == _NEGATIVE_INFINITY:
            continue
        faults[row] = _OK
        row_logprobs(
            raw,
            peaks,
            peak,
            targets[row],
            counts[row],
            scratch.near[lane],
            scratch.near_ids[lane],
            scratch.keys[lane],
            scratch.bins[lane],
            row,
            chosen,
            ranks,
            top_ids,
            top,
        )


@exact_kernel
def target_logprobs(
    logits: Any,
    half: Any,
    targets: Any,
    counts: Any,
    scratch: Any,
    faults: Any,
    chosen: Any,
    ranks: Any,
    top_ids: Any,
    top: Any,
) -> Any:
    """Log-probabilities of given tokens: no sampling."""
    for lane in numba.prange(scratch.raw.shape[0]):
        score_lane(
            np.int64(lane), logits, half, targets, counts, scratch, faults, chosen, ranks, top_ids, top
        )


@exact
def tally_tokens(rows: Any, tokens: Any, increment: Any, counts: Any, seen: Any, seen_length: Any) -> Any:
    """Count one token per entry: +2 for a generated one, and the lowest bit for the prompt's."""
    for j in range(rows.shape[0]):
        row, token = rows[j], tokens[j]
        if counts[row, token] == 0:
            seen[row, seen_length[row]] = token
            seen_length[row] += 1
        if increment == 1:
            counts[row, token] |= 1
        else:
            counts[row, token] += 2


class NumbaSampling:
    """See `Sampling`."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._scratch = make_scratch(vocab_size, numba.get_num_threads())
        # Per sequence with penalties: counts by token id, and the ids whose count is not zero.
        # Never-touched pages of either cost no memory.
        self._counts = np.zeros((0, vocab_size), np.int32)
        self._seen = np.empty((0, vocab_size), np.int32)
        self._seen_length = np.zeros(0, np.int64)
        self._free: list[int] = []

    def open_counts(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        if not self._free:
            self._grow(max(8, len(self._counts)))
        row = self._free.pop()
        state = self._counts, self._seen, self._seen_length
        tally_tokens(np.full(len(prompt), row), prompt, 1, *state)
        tally_tokens(np.full(len(generated), row), generated, 2, *state)
        return row

    def close_counts(self, row: int) -> None:
        self._counts[row, self._seen[row, : self._seen_length[row]]] = 0
        self._seen_length[row] = 0
        self._free.append(row)

    def append_counts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        tally_tokens(rows, tokens, 2, self._counts, self._seen, self._seen_length)

    def _grow(self, more: int) -> None:
        old = len(self._counts)
        counts = np.zeros((old + more, self._vocab_size), np.int32)
        seen = np.empty((old + more, self._vocab_size), np.int32)
        longest = int(self._seen_length.max(initial=0))
        counts[:old], seen[:old, :longest] = self._counts, self._seen[:, :longest]
        self._counts, self._seen = counts, seen
        self._seen_length = np.concatenate([self._seen_length, np.zeros(more, np.int64)])
        self._free = list(range(old, old + more))

    def _threads(self) -> Scratch:
        """Scratch for as many threads as numba runs now."""
        if len(self._scratch.raw) != numba.get_num_threads():
            self._scratch = make_scratch(self._vocab_size, numba.get_num_threads())
        return self._scratch

    def sample(self, logits: Tensor, rows: SampleRows, table: SlotTable) -> SampleOutput:
        count = len(rows.slots)
        none = np.zeros(count, np.int64)
        drafted, start, length = rows.drafted, rows.draft_start, rows.draft_length
        if drafted is None or start is None or length is None:
            drafted, start, length = none, none, none
        most = int(table.records["logprobs"][rows.slots].max(initial=-1))
        logprobs = Logprobs.empty(count if most >= 0 else 0, max(most, 0))
        tokens, faults = np.empty(count, np.int64), np.empty(count, np.uint8)
        sample_rows(
            *float_and_half_views(logits),
            np.arange(count) if rows.sources is None else rows.sources,
            rows.slots,
            rows.positions,
            drafted,
            start,
            length,
            table.records,
            table.edits.ids,
            table.edits.values,
            table.allowed.ids,
            table.stops.ids,
            self._counts,
            self._seen,
            self._seen_length,
            self._threads(),
            tokens,
            faults,
            logprobs.chosen,
            logprobs.ranks,
            logprobs.top_ids,
            logprobs.top,
        )
        return SampleOutput(tokens, faults, logprobs if most >= 0 else None)

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        result = Logprobs.empty(len(targets), int(counts.max(initial=0)))
        faults = np.empty(len(targets), np.uint8)
        target_logprobs(
            *float_and_half_views(logits),
            targets,
            counts,
            self._threads(),
            faults,
            result.chosen,
            result.ranks,
            result.top_ids,
            result.top,
        )
        return result, faults
