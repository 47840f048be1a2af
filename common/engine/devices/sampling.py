"""How a device chooses tokens: for a host that waits for them, and in a step that it does not wait for.

Owns the contract, and the arrays on the device. The rule by which a token is chosen is that of
`common.engine.sampling`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.engine.sampling.records import Logprobs, SampleOutput, SampleRows
from common.engine.sampling.slots import SlotTable
from common.sampling import MAX_LOGPROBS

MOST_LOGPROBS = MAX_LOGPROBS  # alternatives of a row


class Sampling(Protocol):
    """As `common.engine.sampling` says. Counts of tokens, for penalties, are rows that it numbers."""

    def open_counts(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        """A row of token counts, filled."""
        ...

    def close_counts(self, row: int) -> None: ...

    def append_counts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None: ...

    def sample(self, logits: Tensor, rows: SampleRows, table: SlotTable) -> SampleOutput:
        """A token per row. `logits` `[>= rows, vocab]`, float32 or bfloat16."""
        ...

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        """Of `targets[i]` and the `counts[i]` most likely tokens under `logits[i]`; and the
        `RowFault` of each row."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class RowBuffers:
    """As `SampleRows`, on the device; what is padding has slot -1."""

    slots: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    sources: Tensor  # int64 [rows]: rows of the logits
    draft_start: Tensor  # int64 [rows]
    draft_length: Tensor  # int64 [rows]
    drafted: Tensor  # int64 [one at least]

    def __len__(self) -> int:
        return len(self.slots)


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """As `SampleOutput`, on the device. Padding has token -1 and no fault."""

    tokens: Tensor  # int64 [rows]; -1 where there is a fault
    faults: Tensor  # uint8 [rows]
    chosen: Tensor  # float32 [rows]
    ranks: Tensor  # int64 [rows]
    top_ids: Tensor  # int64 [rows, MOST_LOGPROBS]
    top: Tensor  # float32 [rows, MOST_LOGPROBS]


class Changes(Protocol):
    @property
    def words(self) -> NDArray[np.int64]:
        """For the device; empty as a rule."""
        ...


class StepSampling(Sampling, Protocol):
    """One that also works in a queue. What the host changes of the slots, and of the rows of counts, it sends
    as numbers in front of the step that it is for."""

    def bind(self, num_slots: int) -> None:
        """Called once, before anything is sampled or recorded."""
        ...

    def changes(self, table: SlotTable) -> Changes:
        """What the host has changed since it last asked."""
        ...

    def resend(self) -> None:
        """A step has failed, and what was sent with it may not have come: `changes` say everything."""
        ...

    def apply(self, words: Tensor, changes: Any) -> None:
        """`changes` as that method gave it, `words` its own on the device. Does not wait."""
        ...

    def choose_into(self, logits: Tensor, rows: RowBuffers, out: Sampled, *, greedy: bool) -> None:
        """A token per row, of at most `most_rows` rows; does not wait, and can be recorded. Tokens that a
        sequence keeps, by what `Sampler.accept` says of drafts, count for its penalties from then on.

        `logits` `[positions, vocab]`; a run of rows that verify drafts comes in one call. `greedy`: no row
        has a temperature, asks for logprobs or has edited logits.
        """
        ...

    @property
    def most_rows(self) -> int:
        """Of one call."""
        ...
