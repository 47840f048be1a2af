"""What passes between an engine's core and its runner: plain data, and nothing else.

The core (host) decides what to compute and keeps the books; the runner (a device: a thread today, a
process or several ranks where that is wanted) computes. No object that either of them changes crosses:
everything here is frozen, made of numbers, bytes, tuples and NumPy arrays, and can be pickled.

    facts   = runner.facts                        once: what the core has to know of the model
    step    = core.plan()                         blocks are taken; `step.input` is a `StepInput`
    result  = runner.submit(step.input).result()
    outputs = core.commit(step, result)           or core.fail(step)

Owns the records; knows nothing of scheduling or of devices. Positions are absolute, ranges half-open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.engine.sampling.records import SampleOutput, SampleRows, TokenLogprob
from common.kv_layout import Fingerprint, KVLayout
from common.sampling import SamplingParams

MAX_CHOICES = 64  # `n` of one request
TO_BE_DRAFTED = -(2**62)  # in place of a token that the draft model guesses


def num_sampler_slots(max_num_seqs: int) -> int:
    """How many slots the sampler has: choices that wait for one of the scheduler's have sampled, too."""
    return max_num_seqs * MAX_CHOICES


@dataclasses.dataclass(frozen=True, slots=True)
class DraftFacts:
    """A draft model that a runner has loaded."""

    name: str
    max_model_len: int  # positions for which it can draft
    relative_size: float  # its weights' bytes, as a share of the model's: about what a token of it costs
    by_text: bool = False  # it has its own tokens, and its KV lies elsewhere


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a runner has loaded, as far as a core or a node needs to know it."""

    fingerprint: Fingerprint
    layout: KVLayout
    num_blocks: int  # of the KV pool
    vocab_size: int
    max_model_len: int  # positions of a sequence
    max_num_seqs: int  # in a step
    max_num_batched_tokens: int  # in a step
    stop_token_ids: tuple[int, ...]  # the model's own
    folder: Path  # the model's, on the runner's machine
    prompt_rows: int = 1  # that one product takes of prompts, filled up; 1: any number
    on_host: bool = True  # computes on the cores that plan the next step, too
    draft: DraftFacts | None = None
    unread_fields: tuple[str, ...] = ()  # of its config.json


@dataclasses.dataclass(frozen=True, slots=True)
class SlotOpening:
    """Fill a sampler slot for a sequence. Its token ids are here where a penalty counts them, and
    empty otherwise."""

    slot: int
    params: SamplingParams
    choice: int
    stop_ids: tuple[int, ...]  # the model's own, ascending; `params` may name more
    prompt_len: int
    prompt_ids: NDArray[np.int64]
    generated_ids: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class SlotChanges:
    """What the sampler does before a step, in the order of the fields. Slots that are not mentioned
    stay as they are, with the tokens that they got from the steps before."""

    reset: bool  # a step has failed: every slot is free
    closed: tuple[int, ...]
    opened: tuple[SlotOpening, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk of a prompt that is scored: the log probability of the token after each position, as
    far as that is prompt."""

    chunk: int  # its index
    top: int  # how many alternatives
    targets: NDArray[np.int64]  # [at most the chunk's length]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What a model computes at once: positions `[starts, starts + lengths)` of a sequence each, of at most
    one chunk per sequence. Those that are computed as generated ones come first."""

    num_generated: int  # chunks of generated positions
    starts: NDArray[np.int64]  # [chunks]
    lengths: NDArray[np.int64]  # [chunks]
    token_ids: NDArray[np.int64]  # [sum of lengths], chunk by chunk
    generated_tables: NDArray[np.int32]  # [num_generated, blocks], filled up with 0
    prompt_tables: NDArray[np.int32]  # [chunks - num_generated, blocks], filled up with 0

    @classmethod
    def of_prompt(cls, token_ids: AnySequence[int], block_size: int, start: int = 0) -> Chunks:
        """Positions of one prompt from `start` on, alone in a pool, whose first blocks it takes."""
        end = start + len(token_ids)
        blocks = np.arange(-(-end // block_size), dtype=np.int32)[None]
        return Chunks(
            num_generated=0,
            starts=np.array([start], np.int64),
            lengths=np.array([len(token_ids)], np.int64),
            token_ids=np.array(token_ids, np.int64),
            generated_tables=blocks[:0],
            prompt_tables=blocks,
        )

    @property
    def num_chunks(self) -> int:
        return len(self.starts)

    def blocks(self, chunk: int, first: int, end: int) -> list[int]:
        """Blocks `[first, end)` of a chunk's sequence."""
        is_prompt = chunk >= self.num_generated
        tables = self.prompt_tables if is_prompt else self.generated_tables
        found: list[int] = tables[chunk - is_prompt * self.num_generated, first:end].tolist()
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DraftInput(Chunks):
    """What the draft model does before a step: it computes positions that it lacks, of sequences of the
    step, and guesses `counts` tokens after them. These are the drafts of their chunks in the step, where
    they stand as `TO_BE_DRAFTED`."""

    chunks: NDArray[np.int64]  # [chunks] of the step, to which these belong
    counts: NDArray[np.int64]  # [chunks]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepInput(Chunks):
    """One step. A chunk is all prompt or all generated. Its last `num_drafted` tokens are guesses; if it
    `samples`, its last `1 + num_drafted` positions choose a token each.

    A token of `token_ids` that is -1 - r is what the step before gave its row r.
    """

    number: int  # one more than the step before had
    copies: tuple[tuple[int, int], ...]  # of whole blocks (from, to), before all else
    slots: SlotChanges
    sequence_ids: NDArray[np.int64]  # [chunks]
    num_drafted: NDArray[np.int64]  # [chunks]
    samples: NDArray[np.bool_]  # [chunks]
    sampled: SampleRows  # its `sources` count the sampled positions of all chunks, in order
    scored: tuple[ScoredChunk, ...]
    drafts: DraftInput | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DraftReport:
    """What came of a `DraftInput`. Drafts that could not be made stand in the step as some token or other,
    which is verified as all drafts are."""

    seconds: float
    faulty: frozenset[int] = frozenset()  # ids of sequences for which it gave NaN or infinity
    forgotten: frozenset[int] = frozenset()  # and of those that it has to be told from the start
    error: str = ""  # why it has computed nothing of this


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step. `sampled` has the rows of `StepInput.sampled`, None where there are none."""

    sampled: SampleOutput | None
    accepted: NDArray[np.int64]  # [chunks that sample]: drafts verified, and one; 0 where there is a fault
    scored: tuple[tuple[TokenLogprob, ...], ...]  # per `StepInput.scored`, one per target
    spoiled: frozenset[int]  # ids of sequences whose new KV is not to be used (soundness.py)
    seconds: float = 0.0  # that the runner took for it
    drafts: DraftReport | None = None  # of `StepInput.drafts`


Filled = Callable[[frozenset[int]], None]
"""Called by a thread of the runner's once the blocks of a step hold their KV, before a token is chosen:
from then on they may be handed to another node, but those of the sequences it is given by their ids.
"""


class Runner(Protocol):
    """The device's side. Steps are computed in the order in which they are submitted."""

    @property
    def facts(self) -> EngineFacts: ...

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        """Compute a step. An error of the future says that what the step wrote is unknown."""
        ...

    def is_lost(self, error: BaseException, /) -> bool:
        """Whether this error of a step says that nothing can be computed any more."""
        ...

    def close(self, within_s: float | None = None) -> None:
        """Wait for what was submitted, and end. `EngineBroken` if that takes longer."""
        ...
