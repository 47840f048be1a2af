"""The tokens of one choice in the order of their positions, in whatever order they arrive.

Owns: ordering, duplicates, late attempts, the end of a choice, and the position up to which all tokens
have arrived (which is what is acknowledged). No I/O and no clocks: runs in, arrivals out.

Rules, with `P` the first position that has not arrived:

- a run of the current attempt beyond `P` waits; from `P` on its tokens are delivered;
- a position that was delivered before is compared: an equal token is a duplicate and dropped, a
  different one is counted (`Arrival.mismatched`). The token at a position is a pure function, so a
  difference is an error of ours; the client keeps what it was given;
- an older attempt's tokens are never delivered, only compared;
- the end is a position: the run that carries it may be the first to arrive or the last.
"""

from __future__ import annotations

import dataclasses

from common.errors import ProtocolError
from common.wire.messages import TokenLogprobs, TokenRun

FINISHED = ("stop", "length")


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """`accepted`: it had been drafted. `rejected`: how many others had been, for the step of which it is the
    last token."""

    token_id: int
    logprobs: TokenLogprobs | None
    accepted: bool = False
    rejected: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """What one run brought. `finished` is the reason when this run completed the choice."""

    delivered: tuple[Token, ...] = ()
    duplicates: int = 0
    mismatched: int = 0
    finished: str | None = None


class ChoiceStream:
    """Tokens of one choice. `limit` is how many may come at most (`max_tokens`)."""

    def __init__(self, prompt_len: int, limit: int) -> None:
        self.prompt_len = prompt_len
        self.attempt = 1
        self.finished: str | None = None
        self._limit = limit
        self._tokens: list[int] = []
        self._waiting: dict[int, Token] = {}
        self._end: tuple[int, str] | None = None  # position after the last token, reason

    @property
    def below(self) -> int:
        """All positions below this one have arrived."""
        return self.prompt_len + len(self._tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Delivered tokens, the first at `prompt_len`."""
        return tuple(self._tokens)

    def begin(self, attempt: int) -> None:
        """Begin a new attempt at `below`. Tokens of the old one that waited are dropped."""
        if attempt <= self.attempt:
            raise AssertionError(f"attempt {attempt} is not after {self.attempt}")
        self.attempt = attempt
        self._waiting.clear()
        self._end = None

    def acknowledged(self, run: TokenRun) -> int:
        """The position below which to acknowledge to the sender of `run`: of an old attempt, all that it
        sent."""
        return self.below if run.attempt == self.attempt else run.end

    def accept(self, run: TokenRun) -> Arrival:
        """Take in one run; raises `ProtocolError` for one that cannot belong to this choice."""
        self._check(run)
        if run.attempt > self.attempt:
            raise ProtocolError(
                f"attempt {run.attempt} of {run.request} was never dispatched", param="attempt"
            )
        is_late = run.attempt < self.attempt or self.finished is not None
        duplicates = mismatched = 0
        for index, token_id in enumerate(run.token_ids):
            position = run.position + index
            known = self._known(position)
            if known is not None:
                duplicates += 1
                mismatched += known != token_id
            elif not is_late:
                logprobs = run.logprobs[index] if run.logprobs else None
                rejected = run.drafted - run.accepted if position + 1 == run.end else 0
                self._waiting[position] = Token(token_id, logprobs, index < run.accepted, rejected)
        if is_late:
            return Arrival(duplicates=duplicates, mismatched=mismatched)
        if run.finish_reason:
            mismatched += self._note_end(run.end, run.finish_reason)
        delivered = self._deliver()
        return Arrival(delivered, duplicates, mismatched, finished=self.finished)

    def _check(self, run: TokenRun) -> None:
        end = run.end
        if run.position < self.prompt_len or end > self.prompt_len + self._limit:
            raise ProtocolError(
                f"positions {run.position} to {end} of {run.request} are outside "
                f"{self.prompt_len} to {self.prompt_len + self._limit}",
                param="position",
            )
        if run.logprobs and len(run.logprobs) != len(run.token_ids):
            raise ProtocolError("one entry of logprobs per token, or none", param="logprobs")
        room = self.prompt_len + self._limit - 1 - run.position  # one more token follows all drafts
        if not 0 <= run.accepted <= min(run.drafted, len(run.token_ids)) or run.drafted > max(0, room):
            raise ProtocolError(
                f"{run.accepted} of {run.drafted} drafts at {run.position} of {run.request}", param="drafted"
            )
        if run.finish_reason and run.finish_reason not in FINISHED:
            raise ProtocolError(f"a choice does not end by {run.finish_reason!r}", param="finish_reason")

    def _known(self, position: int) -> int | None:
        index = position - self.prompt_len
        if index < len(self._tokens):
            return self._tokens[index]
        waiting = self._waiting.get(position)
        return None if waiting is None else waiting.token_id

    def _note_end(self, position: int, reason: str) -> bool:
        """Remember where the choice ends; true when that contradicts what is known."""
        if self._end is None and position >= self.below:
            self._end = (position, reason)
        return self._end != (position, reason)

    def _deliver(self) -> tuple[Token, ...]:
        delivered = []
        end = self._end[0] if self._end is not None else None
        while (end is None or self.below < end) and self.below in self._waiting:
            token = self._waiting.pop(self.below)
            self._tokens.append(token.token_id)
            delivered.append(token)
        if self._end is not None and self.below == self._end[0]:
            self.finished = self._end[1]
            self._waiting.clear()
        return tuple(delivered)
