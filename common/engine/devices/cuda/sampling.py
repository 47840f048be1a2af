"""The sampler on a GPU: `Sampling` for whoever waits for tokens, and its launches alone for CUDA graphs.

Owns what travels between host and device. The rule is that of `common.engine.sampling`, to the bit: masses,
cuts, counts and faults are integers or correctly rounded; of the noise the logarithms may differ by an ulp
(`kernels.sampling_race`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices import sampling
from common.engine.devices.cuda.sampler_state import Changes, PendingCounts, SamplerState
from common.engine.devices.cuda.sampling_launches import ALL, GREEDY, Shape, Stages, Targets, Workspace, run
from common.engine.devices.sampling import RowBuffers, Sampled
from common.engine.sampling.records import Logprobs, SampleOutput, SampleRows
from common.engine.sampling.slots import SlotTable
from common.sampling import MAX_LOGPROBS

__all__ = ["ALL", "GREEDY", "CudaSampling", "PackedSampled", "Stages", "row_buffers"]

_H100 = 132  # multiprocessors


@dataclasses.dataclass(frozen=True, slots=True)
class PackedSampled(Sampled):
    """All arrays are views of `packed`, uint8, so that one copy brings them to the host."""

    packed: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> PackedSampled:
        return cls.of(torch.zeros(cls.num_bytes(rows), dtype=torch.uint8, device=device))

    @staticmethod
    def num_bytes(rows: int) -> int:
        return sum(size for _, _, size in _parts(rows))

    @classmethod
    def of(cls, packed: Tensor) -> PackedSampled:
        """`packed` has `num_bytes` of some number of rows."""
        rows, views, start = len(packed) // PackedSampled.num_bytes(1), [], 0
        for kind, shape, size in _parts(rows):
            views.append(packed[start : start + size].view(kind).view(shape))
            start += size
        top_ids, tokens, ranks, top, chosen, faults = views
        return cls(tokens, faults, chosen, ranks, top_ids, top, packed)

    @staticmethod
    def output(host: NDArray[np.uint8], rows: int, most: int) -> SampleOutput:
        """Of the first `rows` rows of a copy of `packed`; `most` alternatives were asked for, -1: no
        logprobs."""
        there = PackedSampled.of(torch.from_numpy(host))
        logprobs = None
        if most >= 0:
            logprobs = Logprobs(
                chosen=there.chosen[:rows].numpy(),
                ranks=there.ranks[:rows].numpy(),
                top_ids=there.top_ids[:rows, :most].numpy(),
                top=there.top[:rows, :most].numpy(),
            )
        return SampleOutput(there.tokens[:rows].numpy(), there.faults[:rows].numpy(), logprobs)


def _parts(rows: int) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    """Of `PackedSampled.packed`: types, shapes and bytes, those of 8 bytes first."""
    parts = [
        (torch.int64, (rows, MAX_LOGPROBS)),
        (torch.int64, (rows,)),
        (torch.int64, (rows,)),
        (torch.float32, (rows, MAX_LOGPROBS)),
        (torch.float32, (rows,)),
        (torch.uint8, (rows,)),
    ]
    return [(kind, shape, kind.itemsize * int(np.prod(shape))) for kind, shape in parts]


class CudaSampling:
    """See `Sampling`. At most `max_rows` rows go through one series of launches; all of one stream.

    In a graph: `changes` and `apply` before it, `sample_into` inside.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, *, max_rows: int = 256, multiprocessors: int = _H100
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._max_rows = max_rows
        self._multiprocessors = multiprocessors
        self._counts = PendingCounts()
        self._state: SamplerState | None = None
        self._space: Workspace | None = None

    # ---- what the sequences' counts are told

    def open_counts(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        return self._counts.open(prompt, generated)

    def close_counts(self, row: int) -> None:
        self._counts.close(row)

    def append_counts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        self._counts.append(rows, tokens)

    # ---- in a graph

    def bind(self, num_slots: int) -> None:
        """Allocate what launches read and write, for as many slots; whatever is captured comes after this."""
        if self._state is None:
            self._state = SamplerState(self._vocab_size, num_slots, self._device)
            self._space = Workspace(self._vocab_size, self._max_rows, self._device)
        assert self._state.num_slots == num_slots, "a sampler has one slot table"

    @property
    def workspace_bytes(self) -> int:
        """What `bind` takes besides records, lists and counts."""
        return self._space.num_bytes() if self._space is not None else 0

    def changes(self, table: SlotTable) -> Changes:
        """What the device has to be told before the next `sample_into`; `Changes.words` go there in one
        copy."""
        self.bind(len(table.records))
        assert self._state is not None
        return self._state.changes(table, self._counts)

    def apply(self, words: Tensor, changes: sampling.Changes) -> None:
        """Tell it: `words` are those of `changes`, on the device. Does not wait."""
        assert self._state is not None
        assert isinstance(changes, Changes)
        self._state.apply(words, changes)

    def resend(self) -> None:
        """A step has failed, and what was sent with it may not have come: `changes` say everything."""
        if self._state is not None:
            self._state.resend()

    @property
    def most_rows(self) -> int:
        """Of one `sample_into`."""
        return self._max_rows

    def choose_into(self, logits: Tensor, rows: RowBuffers, out: Sampled, *, greedy: bool) -> None:
        """`sample_into` with one of two sets of launches, counting. `greedy`: no row has a temperature, asks
        for logprobs or has edited logits."""
        self.sample_into(logits, rows, out, GREEDY if greedy else ALL, append=True)

    def sample_into(
        self,
        logits: Tensor,
        rows: RowBuffers,
        out: Sampled,
        stages: Stages,
        *,
        append: bool,
        targets: Targets | None = None,
    ) -> None:
        """Choose a token for each of `rows`. Launches only, the same for whatever is in the buffers.

        logits `[.., vocab]` bfloat16, float16 or float32, each row contiguous. With `append` the tokens that
        the rows give their slots are counted here (those that `Sampler.accept` takes), and not by
        `append_counts`; then the rows of a slot have to be in one call. With `targets` tokens are not chosen.
        """
        assert self._state is not None
        assert self._space is not None
        assert logits.stride(1) == 1
        run(
            logits,
            rows,
            out,
            (self._state.records, self._state.addresses),
            self._space,
            Shape.of(self._vocab_size, len(rows.slots), self._multiprocessors),
            stages,
            append=append,
            targets=targets,
        )

    # ---- for whoever waits

    def sample(self, logits: Tensor, rows: SampleRows, table: SlotTable) -> SampleOutput:
        changes = self.changes(table)
        self.apply(torch.from_numpy(changes.words).to(self._device), changes)
        count = len(rows.slots)
        records = table.records[rows.slots]
        none = np.zeros(count, np.int64)
        drafted, start, length = rows.drafted, rows.draft_start, rows.draft_length
        if drafted is None or start is None or length is None or not len(drafted):
            drafted, start, length = np.zeros(1, np.int64), none, none
        sources = np.arange(count) if rows.sources is None else rows.sources
        sent = self._send(np.stack([rows.slots, rows.positions, sources, start, length]))
        drafts = self._send(drafted)
        most = int(records["logprobs"].max(initial=-1))
        stages, out = Stages.of(records), []
        for begin in range(0, count, self._max_rows):
            part = row_buffers(sent[:, begin : begin + self._max_rows].contiguous(), drafts)
            out.append(PackedSampled.allocate(len(part.slots), self._device))
            self.sample_into(logits, part, out[-1], stages, append=False)
        return _joined([_received(each, most) for each in out], most)

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        assert self._state is not None, "no slot table is known yet"
        count, most = len(targets), int(counts.max(initial=0))
        slots = np.full(count, self._state.num_slots)
        none = np.zeros(count, np.int64)
        sent = self._send(np.stack([slots, none, np.arange(count), none, none, targets, counts]))
        drafts = self._send(none[:1])
        stages, out = dataclasses.replace(GREEDY, logprobs=True), []
        for begin in range(0, count, self._max_rows):
            part = sent[:, begin : begin + self._max_rows].contiguous()
            rows, scored = row_buffers(part[:5], drafts), Targets(part[5], part[6])
            out.append(PackedSampled.allocate(len(rows.slots), self._device))
            self.sample_into(logits, rows, out[-1], stages, append=False, targets=scored)
        output = _joined([_received(each, most) for each in out], most)
        assert output.logprobs is not None
        return output.logprobs, output.faults

    def _send(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self._device)


def row_buffers(five: Tensor, drafted: Tensor) -> RowBuffers:
    """`five` int64 `[5, rows]` has all but `drafted` in their order."""
    slots, positions, sources, draft_start, draft_length = five
    return RowBuffers(slots, positions, sources, draft_start, draft_length, drafted)


def _received(sampled: PackedSampled, most: int) -> SampleOutput:
    return PackedSampled.output(sampled.packed.cpu().numpy(), len(sampled.tokens), most)


def _joined(parts: list[SampleOutput], most: int) -> SampleOutput:
    if len(parts) == 1:
        return parts[0]
    logprobs = Logprobs.empty(0, 0) if most >= 0 else None
    if not parts:
        return SampleOutput(np.empty(0, np.int64), np.empty(0, np.uint8), logprobs)
    if most >= 0:
        known = [part.logprobs for part in parts if part.logprobs is not None]
        logprobs = Logprobs(
            *(
                np.concatenate([getattr(each, field.name) for each in known])
                for field in dataclasses.fields(Logprobs)
            )
        )
    return SampleOutput(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.faults for part in parts]),
        logprobs,
    )
