"""One attempt of a request on a node: what every role keeps of it, and how outputs become runs."""

from __future__ import annotations

import dataclasses
import time

from common.engine.output import StepOutput
from common.engine.sequence import Sequence
from common.messages import Dispatch, TokenLogprobs, TokenRun
from common.node.token_stream import ChoiceKey
from common.queue import Entry
from common.sampling import FinishReason


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """`entry` is None where the request came by a handoff; `open_choices` are not over yet."""

    request: str
    number: int
    gateway: str
    entry: Entry | None
    open_choices: set[int]
    sequences: dict[int, Sequence] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.monotonic)
    handoffs: dict[int, float] = dataclasses.field(default_factory=dict)  # seconds, by choice
    cached_tokens: int | None = None  # of the prompt; None until its first chunk begins

    @property
    def engine_id(self) -> str:
        """What the engine calls it: attempts of one request never mix."""
        return f"{self.request}/{self.number}"

    def key(self, choice: int) -> ChoiceKey:
        return ChoiceKey(self.request, self.number, choice)

    @classmethod
    def of(cls, entry: Entry) -> Attempt:
        dispatch: Dispatch = entry.dispatch
        return cls(
            dispatch.request, dispatch.attempt, dispatch.gateway, entry, set(dispatch.choices)
        )

    def run(self, output: StepOutput) -> TokenRun:
        """What goes to the gateway for one output of the engine."""
        reason = "" if output.finish_reason is None else output.finish_reason.value
        return TokenRun(
            self.request, self.number, output.choice, output.position, output.token_ids,
            tuple(
                TokenLogprobs(
                    entry.logprob, entry.rank, tuple(i for i, _ in entry.top),
                    tuple(value for _, value in entry.top),
                )
                for entry in output.logprobs
            ),
            reason,
        )  # fmt: skip

    @staticmethod
    def failed(output: StepOutput) -> bool:
        return output.finish_reason is FinishReason.ERROR
