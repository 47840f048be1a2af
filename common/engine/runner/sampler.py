"""The sampler: which token comes next, for every row of a step.

    sampler.change(step.slots)                      who enters, who has left
    output = sampler.sample(logits, step.sampled)
    kept = sampler.accept(step.sampled, output)     which drafts were right; the tokens count from now on

The rule by which a token is chosen is written in `common.engine.sampling`.

Owns the slots. Knows nothing of sequences, steps or stop rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.sampling import Sampling
from common.engine.interface import SlotChanges
from common.engine.sampling.records import Logprobs, RowFault, SampleOutput, SampleRows
from common.engine.sampling.slots import SlotTable
from common.errors import TokenOutOfRange
from common.sampling import SamplingParams


class Sampler:
    """Slots are numbers in `[0, slots)` that the caller hands out. Not thread-safe."""

    def __init__(self, vocab_size: int, slots: int, sampling: Sampling, *, counts: bool = True) -> None:
        """`counts`: it is told of every token by `append` or `accept`, and checks that none is missing. In a
        queue the device counts by itself, and the host hears of tokens too late."""
        self._counts = counts
        self._table = SlotTable(slots, vocab_size)
        self._generated = np.zeros(slots, np.int64)  # tokens appended
        self._sampling = sampling

    @property
    def table(self) -> SlotTable:
        return self._table

    @property
    def vocab_size(self) -> int:
        return self._table.vocab_size

    def change(self, changes: SlotChanges) -> None:
        """Before a step: a reset, slots that close, slots that open, in this order."""
        if changes.reset:
            for slot in np.flatnonzero(self._table.records["live"]).tolist():
                self.remove(slot)
        for slot in changes.closed:
            self.remove(slot)
        for opening in changes.opened:
            self.add(
                opening.slot,
                opening.params,
                opening.choice,
                opening.stop_ids,
                opening.prompt_ids,
                opening.generated_ids,
                prompt_len=opening.prompt_len,
            )

    def add(
        self,
        slot: int,
        params: SamplingParams,
        choice: int,
        stop_ids: Sequence[int],
        prompt_ids: Sequence[int] | NDArray[np.int64],
        generated_ids: Sequence[int] | NDArray[np.int64] = (),
        *,
        prompt_len: int | None = None,
    ) -> None:
        """Fill a free slot. `stop_ids`: the model's; those of `params` are added to them.
        `generated_ids`: tokens delivered by an earlier attempt. Without penalties `prompt_len` will
        do in place of both. Raises `InvalidRequest`."""
        length = len(prompt_ids) if prompt_len is None else prompt_len
        counts = -1
        if params.has_penalties:
            prompt, generated = self._tokens(prompt_ids), self._tokens(generated_ids)
            counts = self._sampling.open_counts(prompt, generated)
        try:
            self._table.add(slot, params, choice, stop_ids, length, counts)
        except BaseException:
            if counts >= 0:
                self._sampling.close_counts(counts)
            raise
        self._generated[slot] = len(generated_ids)

    def remove(self, slot: int) -> None:
        counts = int(self._table.records["counts"][slot])
        self._table.remove(slot)
        if counts >= 0:
            self._sampling.close_counts(counts)

    def append(self, slots: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Accepted tokens, one per entry; a slot may occur several times, in order."""
        np.add.at(self._generated, slots, 1)
        counts = self._table.records["counts"][slots]
        tracked = counts >= 0
        if tracked.any():
            self._sampling.append_counts(counts[tracked], token_ids[tracked])

    def sample(self, logits: Tensor, rows: SampleRows) -> SampleOutput:
        """Choose a token per row. `logits`: `[>= rows, vocab]`, float32 or bfloat16."""
        records = self._table.records[rows.slots]
        assert records["live"].all(), "a row names a free slot"
        assert logits.shape[1] == self.vocab_size
        tracked = records["counts"] >= 0
        if self._counts and tracked.any():
            drafted = 0 if rows.draft_length is None else rows.draft_length[tracked]
            known = self._generated[rows.slots[tracked]] + drafted
            before = rows.positions[tracked] - records["prompt_length"][tracked]
            assert (known == before).all(), "a position does not follow the tokens appended"
        return self._sampling.sample(logits, rows, self._table)

    def accept(self, rows: SampleRows, output: SampleOutput) -> NDArray[np.int64]:
        """As `accepted`; what is taken is appended."""
        kept, taken = accepted(rows, output)
        self.append(rows.slots[taken], output.token_ids[taken])
        return kept

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], top: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        """Logprobs of given tokens (of a prompt, say): `targets[i]` and the `top[i]` most likely
        ones under `logits[i]`; and the `RowFault` of each row."""
        assert len(targets) == len(top) <= logits.shape[0]
        return self._sampling.logprobs(logits, targets, top)

    def _tokens(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        tokens = np.asarray(token_ids, np.int64)
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            raise TokenOutOfRange(
                f"token id {tokens[outside][0]}, the vocabulary has {self.vocab_size}", param="prompt"
            )
        return tokens


def accepted(rows: SampleRows, output: SampleOutput) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """How many tokens each run of rows gives its slot, `[runs]`: drafts while they equal the sampled tokens,
    then one more; none where its first row has a fault. And which rows these are, `[rows]`.

    A run is the rows of one slot: one, or 1 + k that verify k drafts.
    """
    sound = output.faults == RowFault.NONE
    if rows.drafted is None or not len(rows.drafted):
        return sound.astype(np.int64), sound
    assert rows.draft_start is not None
    assert rows.draft_length is not None
    starts = np.flatnonzero(rows.draft_length == 0)
    ends = np.append(starts[1:], len(sound))
    kept = sound[starts].astype(np.int64)
    for run in np.flatnonzero((ends - starts > 1) & sound[starts]):
        first, end = starts[run], ends[run]
        at = rows.draft_start[first]
        drafts = rows.drafted[at : at + end - first - 1]
        # A fault after a good token shows when its own turn comes.
        right = (output.token_ids[first : end - 1] == drafts) & sound[first + 1 : end]
        kept[run] += right.cumprod().sum()
    return kept, rows.draft_length < np.repeat(kept, ends - starts)
