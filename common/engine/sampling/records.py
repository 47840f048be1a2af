"""What goes into a call of the sampler and what comes out: plain arrays on the host.

Owns the records; knows nothing of how a token is chosen.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from numpy.typing import NDArray


class RowFault(enum.IntEnum):
    """Why a row has no token. The engine fails that row's sequence, and no other."""

    NONE = 0
    NOT_FINITE = 1  # NaN or +inf among the logits (-inf is a banned token)
    NO_TOKEN_LEFT = 2  # every token is banned


@dataclasses.dataclass(frozen=True, slots=True)
class SampleRows:
    """Which token each row decides. All arrays int64 of length `rows`, but `drafted`.

    `positions` are absolute: the index, in its sequence, of the token to be chosen (the first one
    after the prompt has position `prompt_length`).

    Verification of k drafts is 1 + k rows of one slot at positions p … p + k; row j has the first
    j drafts before it: `drafted[draft_start : draft_start + j]`, shared by these rows.

    `sources` names the logits row of each row, where it is not the row of the same number
    (several choices sampled from the end of one prompt).
    """

    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    drafted: NDArray[np.int64] | None = None
    draft_start: NDArray[np.int64] | None = None
    draft_length: NDArray[np.int64] | None = None
    sources: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities: before bias, penalties, temperature.

    Ranks count from 1; equal logits rank by id. `top_*` have as many columns as the row that asks
    for most; what a row did not ask for is id -1 and NaN.
    """

    chosen: NDArray[np.float32]  # [rows]
    ranks: NDArray[np.int64]  # [rows]; 0 where the row did not ask
    top_ids: NDArray[np.int64]  # [rows, most]
    top: NDArray[np.float32]  # [rows, most]

    @classmethod
    def empty(cls, rows: int, most: int) -> Logprobs:
        return cls(
            chosen=np.full(rows, np.nan, np.float32),
            ranks=np.zeros(rows, np.int64),
            top_ids=np.full((rows, most), -1, np.int64),
            top=np.full((rows, most), np.nan, np.float32),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one position: `top` are (token id, logprob), the most likely first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, scores: Logprobs, row: int, top: int) -> TokenLogprob:
        """Of one row that asked for `top`; a small vocabulary has fewer."""
        ids = scores.top_ids[row, :top]
        ids = ids[ids >= 0]
        logprobs = scores.top[row, : len(ids)]
        return cls(
            float(scores.chosen[row]),
            int(scores.ranks[row]),
            tuple(zip(ids.tolist(), logprobs.tolist(), strict=True)),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class SampleOutput:
    token_ids: NDArray[np.int64]  # [rows]; -1 where there is a fault
    faults: NDArray[np.uint8]  # [rows], of RowFault
    logprobs: Logprobs | None  # None when no row asks
