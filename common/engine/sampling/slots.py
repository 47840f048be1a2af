"""Per-sequence sampling state, by slot: filled when a sequence enters, read at every step.

Owns: the slot table and the ragged lists of token ids behind it (biased and banned, allowed,
stop ids held back by min_tokens). Knows nothing of logits or devices; the token counts for
penalties live on the device (`devices.device.Sampling`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.sampling import SamplingParams

Records: TypeAlias = NDArray[np.void]

# One record per slot. `*_start`, `*_length` point into the ragged list of that name.
SLOT = np.dtype(
    [
        ("temperature", np.float64),
        ("inverse_temperature", np.float32),  # 1 / temperature, at most the largest float32
        ("top_p", np.float64),
        ("min_p_cut", np.float64),  # temperature * log(min_p): added to the largest logit; or -inf
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("choice", np.int64),
        ("prompt_length", np.int64),
        ("min_position", np.int64),  # stop ids are banned at positions below
        ("logprobs", np.int64),  # alternatives wanted; -1: no logprobs at all
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("counts", np.int64),  # row of the token counts; -1: no penalties
        ("edits_start", np.int64),
        ("edits_length", np.int64),
        ("allowed_start", np.int64),
        ("allowed_length", np.int64),
        ("stops_start", np.int64),
        ("stops_length", np.int64),
        ("edited", np.bool_),  # logits differ from the model's: the slow path
        ("live", np.bool_),
    ],
    align=True,
)

_SMALL = 64  # entries that are not worth compacting


class RaggedLists:
    """Lists of ascending token ids (each with a float32 value) of all slots, end to end in two arrays."""

    def __init__(self, name: str) -> None:
        self.ids: NDArray[np.int64] = np.zeros(_SMALL, np.int64)
        self.values: NDArray[np.float32] = np.zeros(_SMALL, np.float32)
        self._start = f"{name}_start"
        self._length = f"{name}_length"
        self._dropped = 0
        self.end = 0  # of what is used
        self.fresh = 0  # entries from here on are not yet where a device has its copy, which then moves this

    def put(self, record: Any, ids: Sequence[int], values: Sequence[float] | None = None) -> None:
        end = self.end + len(ids)
        if end > len(self.ids):
            room = max(end, 2 * len(self.ids))
            self.ids = np.resize(self.ids, room)
            self.values = np.resize(self.values, room)
        self.ids[self.end : end] = ids
        self.values[self.end : end] = 0.0 if values is None else values
        record[self._start], record[self._length] = self.end, len(ids)
        self.end = end

    def drop(self, records: Records, slot: int) -> bool:
        """Forget the list of `slot`; closes the gaps once they are half of what is used: then other lists
        have moved, and it returns True."""
        self._dropped += int(records[self._length][slot])
        records[self._length][slot] = 0
        closes = self.end > _SMALL and 2 * self._dropped > self.end
        if closes:
            starts, lengths = records[self._start], records[self._length]
            index = ragged_index(starts, lengths)
            self.ids[: len(index)] = self.ids[index]
            self.values[: len(index)] = self.values[index]
            records[self._start] = np.cumsum(lengths) - lengths
            self.end, self._dropped, self.fresh = len(index), 0, 0
        return closes


def ragged_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of `range(start, start + length)` over all pairs."""
    before = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    return np.repeat(starts - before, lengths) + np.arange(total, dtype=np.int64)


class SlotTable:
    """`records[slot]` and the ragged lists; slots are the caller's numbers in [0, slots)."""

    def __init__(self, slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.records: Records = np.zeros(slots, SLOT)
        self.changed: set[int] = set()  # slots; emptied by a device that has copies of their records
        self.edits = RaggedLists("edits")  # logit_bias, and banned ids with -inf
        self.allowed = RaggedLists("allowed")
        self.stops = RaggedLists("stops")

    def add(
        self,
        slot: int,
        params: SamplingParams,
        choice: int,
        stop_ids: Sequence[int],
        prompt_length: int,
        counts: int,
    ) -> None:
        """Fill a free slot. `InvalidRequest` names a token id outside the vocabulary."""
        params.check_vocabulary(self.vocab_size)
        edits = _merged_edits(params)
        allowed = sorted(set(params.allowed_token_ids or ()))
        stops = sorted({*stop_ids, *params.stop_token_ids}) if params.min_tokens else []
        assert all(0 <= token < self.vocab_size for token in stops), "stop id not in vocabulary"

        record = self.records[slot]
        assert not record["live"], f"slot {slot} is taken"
        temperature = params.temperature
        record["temperature"] = temperature
        largest = float(np.finfo(np.float32).max)
        record["inverse_temperature"] = min(1.0 / temperature, largest) if temperature else 0.0
        record["top_p"] = params.top_p
        record["top_k"] = min(params.top_k, self.vocab_size)
        record["min_p_cut"] = temperature * math.log(params.min_p) if params.min_p else -math.inf
        record["seed"] = params.seed
        record["choice"] = choice
        record["prompt_length"] = prompt_length
        record["min_position"] = prompt_length + params.min_tokens
        record["logprobs"] = -1 if params.logprobs is None else params.logprobs
        record["repetition"] = params.repetition_penalty
        record["presence"] = params.presence_penalty
        record["frequency"] = params.frequency_penalty
        record["counts"] = counts
        self.edits.put(record, list(edits), list(edits.values()))
        self.allowed.put(record, allowed)
        self.stops.put(record, stops)
        record["edited"] = bool(edits or allowed or stops or counts >= 0)
        record["live"] = True
        self.changed.add(slot)

    def remove(self, slot: int) -> None:
        assert self.records["live"][slot], f"slot {slot} is free"
        self.records["live"][slot] = False
        moved = [lists.drop(self.records, slot) for lists in (self.edits, self.allowed, self.stops)]
        if any(moved):
            self.changed.update(np.flatnonzero(self.records["live"]).tolist())


def _merged_edits(params: SamplingParams) -> dict[int, float]:
    """What to add to which logit: each id once, ascending (biases of an id named twice add up)."""
    edits: dict[int, float] = {}
    for token, bias in params.logit_bias:
        edits[token] = edits.get(token, 0.0) + bias
    edits.update((token, -math.inf) for token in params.banned_token_ids)
    return dict(sorted(edits.items()))
