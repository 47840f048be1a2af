"""The sampler's memory on the device, and what of it changes from step to step.

Owns the records, lists and token counts as the kernels read them, and how a step's changes travel: as one
flat array of int64 words. The host's truth stays in `sampling.slots.SlotTable`. Memory that grows does so
without a new address in any launch: kernels find lists and counts by a table of addresses on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.cuda.kernels.sampling_changes import clear_kernel, records_kernel, tally_kernel
from common.engine.devices.cuda.kernels.sampling_values import RECORD_WORDS
from common.engine.devices.cuda.launch import Launch, Work
from common.engine.sampling.slots import RaggedLists, Records, SlotTable

Words = NDArray[np.int64]

LISTS = ("edits", "allowed", "stops")  # their addresses follow that of the counts
_ADDRESSES = 1 + len(LISTS)
_TILE = 1024
_LEAST_ENTRIES = 1024
_LEAST_COUNTS = 8
_IN_PROMPT, _GENERATED = 1, 2  # what a token adds to its count

_RECORDS = Launch(kernel=records_kernel, constants={}, num_warps=1)
_CLEAR = Launch(kernel=clear_kernel, constants={"WIDTH": _TILE}, num_warps=4)
_TALLY = Launch(kernel=tally_kernel, constants={"WIDTH": _TILE}, num_warps=4)


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """`words` for the device: the table of addresses, then what the other fields count, in their order, each
    from an even word on. Empty if nothing changed."""

    words: Words
    num_records: int = 0
    entries: tuple[tuple[int, int], ...] = ()  # of each list: places [from, to)
    num_cleared: int = 0
    num_tallied: int = 0
    memory: tuple[Tensor, ...] = ()  # where they go: the counts, and each list
    outgrown: tuple[tuple[Tensor, Tensor], ...] = ()  # what is first copied, and where to


class SamplerState:
    """Not thread-safe; everything in the order of one stream."""

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.num_slots = num_slots
        # One slot more, all zero: of rows that are scored, and belong to no sequence.
        self.records = torch.zeros((num_slots + 1, RECORD_WORDS), dtype=torch.int64, device=device)
        self.addresses = torch.zeros(_ADDRESSES, dtype=torch.int64, device=device)
        # The counts, by row and token: twice the number of times generated, plus one when in the prompt;
        # and the lists.
        self._memory: tuple[Tensor, ...] = (
            torch.empty((_LEAST_COUNTS, vocab_size), dtype=torch.int32, device=device),
            *(torch.empty(_LEAST_ENTRIES, dtype=torch.int64, device=device) for _ in LISTS),
        )
        self._is_current = False  # the device has what `changes` said before

    def changes(self, table: SlotTable, counts: PendingCounts) -> Changes:
        """What `table` and `counts` have that the device has not; they are taken to be told by this. Memory
        grows here, and the next `apply` has to be with what is returned."""
        lists: tuple[RaggedLists, ...] = (table.edits, table.allowed, table.stops)
        if not self._is_current:
            table.changed.update(np.flatnonzero(table.records["live"]).tolist())
            for each in lists:
                each.fresh = 0
        spans = tuple((each.fresh, each.end) for each in lists)
        cleared, tallied = counts.take()
        is_new = bool(table.changed) or any(start < end for start, end in spans)
        if self._is_current and not (is_new or len(cleared) or len(tallied)):
            return Changes(np.empty(0, np.int64))
        slots = np.array(sorted(table.changed), np.int64)
        table.changed.clear()
        used = (len(self._memory[0]), *(start for start, _ in spans))
        wanted = (counts.num_rows, *(end for _, end in spans))
        memory = tuple(_enough(each, size) for each, size in zip(self._memory, wanted, strict=True))
        outgrown = tuple(
            (old[:size], new[:size])
            for old, new, size in zip(self._memory, memory, used, strict=True)
            if old is not new
        )
        self._memory = memory
        for each, end in zip(lists, wanted[1:], strict=True):
            each.fresh = end
        parts = [
            np.array([each.data_ptr() for each in memory], np.int64),
            np.column_stack([slots, packed(table.records[slots])]).ravel(),
            *(_entries(each, *span) for each, span in zip(lists, spans, strict=True)),
            cleared,
            tallied,
        ]
        words = np.concatenate([np.append(part, np.zeros(len(part) % 2, np.int64)) for part in parts])
        self._is_current = True
        return Changes(words, len(slots), spans, len(cleared), len(tallied), memory, outgrown)

    def resend(self) -> None:
        """What `changes` said may not have come: the next ones say everything but counts, of which all rows
        are given back, and opened anew, when a step has failed."""
        self._is_current = False

    def apply(self, words: Tensor, changes: Changes) -> None:
        """`words` are those of `changes`, on the device, from an address that is a multiple of 16 on."""
        if not len(changes.words):
            return
        sizes = [_ADDRESSES, changes.num_records * (1 + RECORD_WORDS)]
        sizes += [end - start for start, end in changes.entries]
        sizes += [changes.num_cleared, changes.num_tallied]
        starts = np.cumsum([0, *(size + size % 2 for size in sizes)]).tolist()
        parts = [words[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        counts, *lists = changes.memory
        for old, new in changes.outgrown:
            new.copy_(old)
        self.addresses.copy_(parts[0])
        if changes.num_records:
            _RECORDS((changes.num_records,), parts[1], self.records)
        for place, (start, end) in enumerate(changes.entries):
            lists[place][start:end].copy_(parts[2 + place])
        if changes.num_cleared:
            tiles = -(-self._vocab_size // _TILE)
            _CLEAR((changes.num_cleared, tiles), parts[-2], counts, self._vocab_size)
        if changes.num_tallied:
            tiles = -(-changes.num_tallied // _TILE)
            _TALLY((tiles,), parts[-1], changes.num_tallied, counts, self._vocab_size)


class PendingCounts:
    """Rows of token counts as the host hands them out, and what the device has yet to be told of them."""

    def __init__(self) -> None:
        self.num_rows = 0  # that there are
        self._free: list[int] = []
        self._cleared: set[int] = set()
        self._tallied: dict[int, list[Words]] = {}

    def open(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        if not self._free:
            more = max(_LEAST_COUNTS, self.num_rows)
            self._free = list(range(self.num_rows, self.num_rows + more))
            self.num_rows += more
        row = self._free.pop()
        self._cleared.add(row)
        self._tallied[row] = [_tally(row, np.unique(prompt), _IN_PROMPT), _tally(row, generated, _GENERATED)]
        return row

    def close(self, row: int) -> None:
        self._cleared.discard(row)
        self._tallied.pop(row, None)
        self._free.append(row)

    def append(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        for row in np.unique(rows).tolist():
            self._tallied.setdefault(row, []).append(_tally(row, tokens[rows == row], _GENERATED))

    def take(self) -> tuple[Words, Words]:
        """(rows to clear, what to add after that), which are pending no more."""
        cleared = np.array(sorted(self._cleared), np.int64)
        parts = [part for parts in self._tallied.values() for part in parts]
        self._cleared, self._tallied = set(), {}
        return cleared, np.concatenate([np.empty(0, np.int64), *parts])


def packed(records: Records) -> Words:
    """What kernels read of `records` `[n]`: int64 `[n, RECORD_WORDS]`, by the words of
    `kernels.sampling_values`."""
    words = np.zeros((len(records), RECORD_WORDS), np.int64)
    for place, column in enumerate(_columns(records)):
        words[:, place] = column
    return words


def _columns(records: Records) -> Iterator[Words]:
    for name in ("temperature", "top_p", "min_p_cut", "seed"):
        yield np.ascontiguousarray(records[name]).view(np.int64)
    for name in ("choice", "top_k", "min_position", "counts", "logprobs"):
        yield records[name]
    for name in LISTS:
        yield records[f"{name}_start"] | (records[f"{name}_length"] << 32)
    for low, high in (("inverse_temperature", "repetition"), ("presence", "frequency")):
        yield _bits(records[low]) | (_bits(records[high]) << 32)
    yield records["edited"].astype(np.int64)


def _bits(values: NDArray[np.float32]) -> Words:
    return np.ascontiguousarray(values).view(np.uint32).astype(np.int64)


def _entries(lists: RaggedLists, start: int, end: int) -> Words:
    return lists.ids[start:end] | (_bits(lists.values[start:end]) << 32)


def _tally(row: int, tokens: NDArray[np.int64], more: int) -> Words:
    return (row << 40) | (tokens << 8) | more


def _enough(memory: Tensor, wanted: int) -> Tensor:
    """`memory`, or new memory of its kind, at least twice as long, where that is too short."""
    if wanted <= len(memory):
        return memory
    return memory.new_empty((max(wanted, 2 * len(memory)), *memory.shape[1:]))


def works(vocab_size: int) -> Iterator[Work]:
    """A step in which four sequences with penalties begin, with prompts of 1,024 tokens."""
    sequences, tokens = 4, 4096
    size = 8 * (1 + RECORD_WORDS)
    yield Work(
        name=f"sampler records {sequences}",
        launch=_RECORDS,
        types=("*i64", "*i64"),
        num_programs=sequences,
        num_bytes=2 * sequences * size,
    )
    tiles = -(-vocab_size // _TILE)
    yield Work(
        name=f"sampler counts cleared {sequences}x{vocab_size}",
        launch=_CLEAR,
        types=("*i64", "*i32", "i32"),
        num_programs=sequences * tiles,
        num_bytes=4 * sequences * vocab_size,
    )
    yield Work(
        name=f"sampler counts of {tokens} tokens",
        launch=_TALLY,
        types=("*i64", "i32", "*i32", "i32"),
        num_programs=-(-tokens // _TILE),
        num_bytes=(8 + 32) * tokens,
    )
