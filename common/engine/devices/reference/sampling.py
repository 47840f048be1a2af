"""The sampler in plain torch operations: for CUDA, and as a second opinion on the CPU one.

Owns: the batched arithmetic, and the token counts of sequences with penalties on the device. Dense
over the vocabulary but for the noise. Cuts are found by bisection over the 32 bits of a float's
order-preserving integer, not by sorting: exact, and independent of how a sort breaks ties.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from common.engine.devices.reference.philox import NoiseKey, group_noise, token_noise
from common.engine.sampling.noise import GROUP
from common.engine.sampling.records import Logprobs, RowFault, SampleOutput, SampleRows
from common.engine.sampling.slots import RaggedLists, Records, SlotTable, ragged_index
from common.engine.sampling.softmax_mass import FLOOR, LN2_HIGH, LN2_LOW, LOG2_E, MASS_BITS, POLYNOMIAL

_KEY_BITS = 32
_INFINITY = math.inf


class TorchSampling:
    """See `Sampling`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        # Twice the number of times generated, plus one when in the prompt.
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free: list[int] = []

    def open_counts(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        if not self._free:
            room = max(8, len(self._counts))
            self._free = list(range(len(self._counts), len(self._counts) + room))
            self._counts = torch.cat([self._counts, self._counts.new_zeros(room, self._vocab_size)])
        row = self._free.pop()
        self._counts[row, self._send(np.unique(prompt))] = 1
        self.append_counts(np.full(len(generated), row), generated)
        return row

    def close_counts(self, row: int) -> None:
        self._counts[row].zero_()
        self._free.append(row)

    def append_counts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        two = torch.full((len(rows),), 2, dtype=torch.int32, device=self._device)
        self._counts.index_put_((self._send(rows), self._send(tokens)), two, accumulate=True)

    def sample(self, logits: Tensor, rows: SampleRows, table: SlotTable) -> SampleOutput:
        records = table.records[rows.slots]
        sources = np.arange(len(rows.slots)) if rows.sources is None else rows.sources
        raw = logits[self._send(sources)].float()
        not_finite = ~(raw < _INFINITY).all(-1)
        values = raw
        if records["edited"].any():
            values = self._edited(raw.clone(), rows, table, records)
            not_finite |= ~(values < _INFINITY).all(-1)
        peaks, tokens = values.max(-1).values, values.argmax(-1)  # argmax: the first of equals
        nothing_left = peaks == -_INFINITY
        sound = ~(not_finite | nothing_left)

        warm = self._send(np.flatnonzero(records["temperature"] > 0.0))
        warm = warm[sound[warm]]
        if len(warm):
            chosen = records[warm.cpu().numpy()]
            tokens[warm] = self._race(
                values[warm], peaks[warm], tokens[warm], chosen, rows.positions[warm.cpu().numpy()]
            )
        tokens = torch.where(sound, tokens, -1)
        faults = torch.where(not_finite, RowFault.NOT_FINITE, RowFault.NONE)
        faults = torch.where(nothing_left & ~not_finite, RowFault.NO_TOKEN_LEFT, faults)

        logprobs = None
        if (records["logprobs"] >= 0).any():
            asking = np.flatnonzero((records["logprobs"] >= 0) & sound.cpu().numpy())
            logprobs = Logprobs.empty(len(records), int(records["logprobs"].max()))
            at = self._send(asking)
            self._logprobs(raw[at], tokens[at], records["logprobs"][asking], asking, logprobs)
        return SampleOutput(tokens.cpu().numpy(), faults.to(torch.uint8).cpu().numpy(), logprobs)

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        raw = logits[: len(targets)].float()
        not_finite = ~(raw < _INFINITY).all(-1)
        nothing_left = ~not_finite & (raw.amax(-1) == -_INFINITY)
        faults = torch.where(not_finite, RowFault.NOT_FINITE, RowFault.NONE)
        faults = torch.where(nothing_left, RowFault.NO_TOKEN_LEFT, faults)
        codes = faults.to(torch.uint8).cpu().numpy()
        sound = np.flatnonzero(codes == RowFault.NONE)
        result = Logprobs.empty(len(targets), int(counts.max(initial=0)))
        self._logprobs(raw[self._send(sound)], self._send(targets[sound]), counts[sound], sound, result)
        return result, codes

    def _send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _ragged(
        self, lists: RaggedLists, name: str, records: Records, rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(row, id, value) of every entry of the lists of `rows`."""
        starts, lengths = records[f"{name}_start"][rows], records[f"{name}_length"][rows]
        index = ragged_index(starts, lengths)
        return (
            self._send(np.repeat(rows, lengths)),
            self._send(lists.ids[index]),
            self._send(lists.values[index]),
        )

    def _edited(self, values: Tensor, rows: SampleRows, table: SlotTable, records: Records) -> Tensor:
        """Bias, allowed and banned ids, min_tokens, penalties; `values` is overwritten."""
        restricted = np.flatnonzero(records["allowed_length"])
        if len(restricted):
            row, token, _ = self._ragged(table.allowed, "allowed", records, restricted)
            allowed = values[row, token]
            values[self._send(restricted)] = -_INFINITY
            values[row, token] = allowed
        row, token, bias = self._ragged(
            table.edits, "edits", records, np.flatnonzero(records["edits_length"])
        )
        values[row, token] += bias
        early = np.flatnonzero((records["stops_length"] > 0) & (rows.positions < records["min_position"]))
        row, token, _ = self._ragged(table.stops, "stops", records, early)
        values[row, token] = -_INFINITY
        penalized = np.flatnonzero(records["counts"] >= 0)
        if len(penalized):
            at = self._send(penalized)
            values[at] = self._penalized(values[at], rows, records, penalized)
        return values

    def _penalized(
        self, values: Tensor, rows: SampleRows, records: Records, penalized: NDArray[np.int64]
    ) -> Tensor:
        chosen = records[penalized]
        counts = self._counts[self._send(chosen["counts"])]
        if rows.drafted is not None:
            assert rows.draft_start is not None
            assert rows.draft_length is not None
            lengths = rows.draft_length[penalized]
            index = ragged_index(rows.draft_start[penalized], lengths)
            row = self._send(np.repeat(np.arange(len(penalized)), lengths))
            two = torch.full((len(index),), 2, dtype=torch.int32, device=self._device)
            counts.index_put_((row, self._send(rows.drafted[index])), two, accumulate=True)
        repetition, presence, frequency = (
            self._send(chosen[name]).unsqueeze(1) for name in ("repetition", "presence", "frequency")
        )
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts > 0, repeated, values)
        generated = counts >> 1
        less = frequency * generated.float()
        return torch.where(generated > 0, (values - less) - presence, values)

    def _cut(
        self, values: Tensor, peaks: Tensor, temperature: Tensor, records: Records
    ) -> tuple[Tensor, Tensor]:
        """(cut, last) `[rows, 1]`: kept is `value > cut`, or equal and id <= last."""
        vocab = values.shape[1]
        ids = torch.arange(vocab, device=self._device)
        cut = torch.full_like(peaks, -_INFINITY).unsqueeze(1)
        last = torch.full_like(cut, -1, dtype=torch.int64)
        min_p = self._send(records["min_p_cut"]).unsqueeze(1)
        bound = (peaks.unsqueeze(1).double() + min_p).float()
        cut = torch.where(min_p > -_INFINITY, bound, cut)
        last = torch.where(min_p > -_INFINITY, vocab, last)

        limited = np.flatnonzero((records["top_k"] > 0) & (records["top_k"] < vocab))
        if len(limited):
            at = self._send(limited)
            weights = _kept(values[at], cut[at], last[at], ids).long()
            target = self._send(records["top_k"][limited]).unsqueeze(1)
            _shorten(values[at], weights, target, cut, last, at)
        nuclear = np.flatnonzero(records["top_p"] < 1.0)
        if len(nuclear):
            at = self._send(nuclear)
            inverse = self._send(records["inverse_temperature"][nuclear]).unsqueeze(1)
            weights = mass(values[at], peaks[at].unsqueeze(1), inverse)
            weights *= _kept(values[at], cut[at], last[at], ids)
            total = weights.sum(-1, keepdim=True)
            top_p = self._send(records["top_p"][nuclear]).unsqueeze(1)
            target = torch.minimum((top_p * total.double()).ceil().long(), total).clamp_min(1)
            _shorten(values[at], weights, target, cut, last, at)
        return cut, last

    def _race(
        self, values: Tensor, peaks: Tensor, firsts: Tensor, records: Records, positions: NDArray[np.int64]
    ) -> Tensor:
        """The winners `[rows]` of Gumbel-max; see `sampling.noise` for the noise and its bound."""
        rows, vocab = values.shape
        temperature = self._send(records["temperature"])
        cut, last = self._cut(values, peaks, temperature, records)
        ids = torch.arange(vocab, device=self._device)
        values = torch.where(_kept(values, cut, last, ids), values, -_INFINITY)
        groups = -(-vocab // GROUP)
        tiles = functional.pad(values, (0, groups * GROUP - vocab), value=-_INFINITY)
        tiles = tiles.view(rows, groups, GROUP)

        key = NoiseKey(
            self._send(records["seed"].view(np.int64)), self._send(records["choice"]), self._send(positions)
        )
        least, holder = group_noise(key, torch.arange(groups, device=self._device).unsqueeze(0))
        log_least = torch.log(least)
        scale, top = temperature.unsqueeze(1), peaks.double().unsqueeze(1)
        held = tiles.gather(2, holder.unsqueeze(2)).squeeze(2)
        best = ((held.double() - top) / scale - log_least).amax(1)
        group = firsts.unsqueeze(1) // GROUP
        noise = token_noise(key, firsts.unsqueeze(1), least.gather(1, group), holder.gather(1, group))
        best = torch.maximum(best, -torch.log(noise.squeeze(1)))

        bound = (tiles.amax(2).double() - top) / scale - log_least
        row, group = torch.nonzero(bound >= best.unsqueeze(1), as_tuple=True)
        lead = (tiles[row, group].double() - top[row]) / scale[row]
        can_win = lead - log_least[row, group].unsqueeze(1) >= best[row].unsqueeze(1)
        which, offset = torch.nonzero(can_win, as_tuple=True)
        lead, row, group = lead[which, offset], row[which], group[which]
        token = group * GROUP + offset
        noise = token_noise(key.take(row), token, least[row, group], holder[row, group])
        score = lead - torch.log(noise)
        best = torch.full_like(best, -_INFINITY).scatter_reduce(0, row, score, "amax")
        token = torch.where(score == best[row], token, vocab)
        return torch.full_like(firsts, vocab).scatter_reduce(0, row, token, "amin")

    def _logprobs(
        self, raw: Tensor, targets: Tensor, counts: NDArray[np.int64], at: NDArray[np.int64], into: Logprobs
    ) -> None:
        if not len(at):
            return
        vocab = raw.shape[1]
        peaks = raw.amax(-1, keepdim=True)
        total = mass(raw, peaks, torch.ones_like(peaks)).sum(-1, keepdim=True)
        log_total = torch.log(total.double()) - MASS_BITS * math.log(2.0)
        value = raw.gather(1, targets.unsqueeze(1))
        ids = torch.arange(vocab, device=raw.device)
        before = (raw > value) | ((raw == value) & (ids < targets.unsqueeze(1)))
        into.ranks[at] = (before.sum(-1) + 1).cpu().numpy()
        chosen = value.double() - peaks.double() - log_total
        into.chosen[at] = chosen.squeeze(1).float().cpu().numpy()
        most = min(int(counts.max()), vocab)
        # Distinct keys, so that equal logits come by id whatever topk does with ties.
        keys = (_ordered(raw).long() << 32) + (0xFFFFFFFF - ids)
        top_ids = 0xFFFFFFFF - (keys.topk(most).values & 0xFFFFFFFF)
        top = raw.gather(1, top_ids).double() - peaks.double() - log_total
        asked = (np.arange(most) < counts[:, None]) & (top > -_INFINITY).cpu().numpy()
        into.top_ids[at, :most] = np.where(asked, top_ids.cpu().numpy(), -1)
        into.top[at, :most] = np.where(asked, top.float().cpu().numpy(), np.nan)


def mass(values: Tensor, peak: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Masses (int64) of float32 logits; `peak` and `inverse_temperature` float32, broadcast."""
    x = ((values - peak) * inverse_temperature).clamp_min(FLOOR)
    n = torch.round(x * _float32(LOG2_E, x))
    f = (x - n * _float32(LN2_HIGH, x)) - n * _float32(LN2_LOW, x)
    p = torch.full_like(f, POLYNOMIAL[-1])
    for coefficient in reversed(POLYNOMIAL[:-1]):
        p = p * f + _float32(coefficient, f)
    power = ((n.to(torch.int32) + (127 + MASS_BITS)) << 23).view(torch.float32)
    return (p * power).long()


def _float32(constant: float, like: Tensor) -> Tensor:
    # A Python scalar may be applied in another precision on some devices; a tensor is not.
    return torch.full((), constant, dtype=torch.float32, device=like.device)


def _kept(values: Tensor, cut: Tensor, last: Tensor, ids: Tensor) -> Tensor:
    return (values > cut) | ((values == cut) & (ids <= last))


def _ordered(values: Tensor) -> Tensor:
    """int32 with the order of the floats; its own inverse on the bits. -0.0 becomes 0.0."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _shorten(values: Tensor, weights: Tensor, target: Tensor, cut: Tensor, last: Tensor, at: Tensor) -> None:
    """Set (cut, last) of the rows `at` to the shortest prefix, by (larger logit, lower id), that
    weighs `target`. Rows whose weights do not exceed it stay as they are."""
    keys = _ordered(values).long()
    low = torch.full_like(target, -(2**31))  # the weight of keys >= low reaches the target
    high = torch.full_like(target, 2**31)  # that of keys >= high does not
    for _ in range(_KEY_BITS):
        middle = (low + high) >> 1
        reached = (weights * (keys >= middle)).sum(-1, keepdim=True) >= target
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle)
    needed = target - (weights * (keys > low)).sum(-1, keepdim=True)
    tied = keys == low
    weight = (weights * tied).amax(-1, keepdim=True).clamp_min(1)
    ties = (needed + weight - 1) // weight
    tied &= weights > 0
    last_tie = ((tied.cumsum(-1) == ties) & tied).long().argmax(-1, keepdim=True)
    exceeds = weights.sum(-1, keepdim=True) > target
    bits = low.to(torch.int32)
    found = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    cut[at] = torch.where(exceeds, found, cut[at])
    last[at] = torch.where(exceeds, last_tie, last[at])
