"""A sequence: one choice of one request inside an engine, and what is known and computed of it.

Owns: the record that scheduler, block pool and model share, its legal states, its block hashes,
and the rule by which it ends. Knows nothing of tensors, of other sequences, or of policy.

    positions   0 ............ prompt_len ............ len(token_ids)
                |  prompt           |   generated, accepted    |  draft_token_ids
                |  KV in the pool: [0, num_computed)           |

An attempt that failed over starts with `len(token_ids) > prompt_len`: the tokens that were
delivered before are replayed as generated ones, because the kernels that compute a position depend
on its side of the border (numerics rule).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum

from common.engine.interface import TO_BE_DRAFTED
from common.kv_layout import block_hash
from common.sampling import FinishReason, SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    PAUSED = "paused"  # holds its blocks and its slot; no step has it
    FINISHED = "finished"


TRANSITIONS: collections.abc.Mapping[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    SequenceStatus.RUNNING: frozenset(
        {SequenceStatus.WAITING, SequenceStatus.PAUSED, SequenceStatus.FINISHED}
    ),
    SequenceStatus.PAUSED: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    SequenceStatus.FINISHED: frozenset(),
}


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """Compared by identity. Only the scheduler changes a sequence once it was handed to it,
    except for `draft_token_ids` and `catches_up`, which a proposer sets before a step."""

    sequence_id: int  # unique in this engine
    request_id: str
    choice: int
    prompt_len: int  # the border: positions below it are prompt
    token_ids: list[int]  # prompt, then accepted generated tokens
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # the model's own; `params` may name more
    priority: int = 0  # lower is more important
    arrival: int = 0
    cache_root: bytes = b""  # parent of the first block's hash
    hash_border: int | None = None  # see `Fingerprint.border`; None: `prompt_len`
    speculates: bool = True  # tokens may be drafted for it
    draft_model_follows: bool = True  # computes its positions, too, so that it can draft now or elsewhere
    prediction: list[int] = dataclasses.field(default_factory=list)  # what its reply may be like

    num_computed: int = 0
    num_draft_computed: int = 0  # by the draft model, of the same positions
    catches_up: bool = False  # the draft model is to compute what it lacks
    in_flight: int = 0  # positions after these that steps under way compute
    pending: int = 0  # tokens that steps under way append
    block_table: list[int] = dataclasses.field(default_factory=list)
    block_hashes: list[bytes] = dataclasses.field(default_factory=list)  # full, accepted blocks
    num_published: int = 0  # leading blocks that were offered to the prefix cache
    draft_token_ids: list[int] = dataclasses.field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    order: tuple[int, int, int] = dataclasses.field(init=False)  # smaller is more important

    def __post_init__(self) -> None:
        self.order = (self.priority, self.arrival, self.sequence_id)
        if self.hash_border is None:
            self.hash_border = self.prompt_len

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def length_limit(self) -> int:
        """What `token_ids` can grow to."""
        return self.prompt_len + self.params.max_tokens

    @property
    def next_position(self) -> int:
        """The first position that no step computes yet."""
        return self.num_computed + self.in_flight

    @property
    def num_known(self) -> int:
        """How many tokens it has once the steps under way have ended."""
        return len(self.token_ids) + self.pending

    @property
    def is_decoding(self) -> bool:
        """Past its prompt, and lacks the KV of its newest token only."""
        position = self.next_position
        return position >= self.prompt_len and position + 1 == self.num_known

    @property
    def num_computable(self) -> int:
        """Known positions one chunk may compute next: it never straddles the prompt border."""
        border, position = self.prompt_len, self.next_position
        return (border if position < border else self.num_known) - position

    @property
    def is_drafted_by_model(self) -> bool:
        """Whether its drafts are for the draft model to make: all of them, or none."""
        return TO_BE_DRAFTED in self.draft_token_ids

    @property
    def room_for_drafts(self) -> int:
        """How many drafts can be of use: one more token is always sampled after them."""
        return self.length_limit - len(self.token_ids) - 1

    def move_to(self, status: SequenceStatus) -> None:
        assert status in TRANSITIONS[self.status], f"{self.status} to {status}"
        self.status = status

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first `count` blocks, which must be full; each is computed once."""
        known, border = self.block_hashes, self.hash_border
        assert border is not None
        assert count * block_size <= len(self.token_ids)
        for index in range(len(known), count):
            start = index * block_size
            known.append(
                block_hash(
                    known[-1] if known else self.cache_root,
                    self.token_ids[start : start + block_size],
                    min(max(border - start, 0), block_size),
                )
            )
        return known if len(known) == count else known[:count]

    def end_at(self, token: int) -> FinishReason | None:
        """Why the sequence ends with `token`, which is the last of `token_ids`; None: it goes on.

        `ignore_eos` switches off the model's own stop ids, not those the user named.
        """
        params = self.params
        num_generated = len(self.token_ids) - self.prompt_len
        if num_generated >= params.min_tokens and (
            (token in self.stop_ids and not params.ignore_eos) or token in params.stop_token_ids
        ):
            return FinishReason.STOP
        if num_generated >= params.max_tokens:
            return FinishReason.LENGTH
        return None
