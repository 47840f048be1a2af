"""One attempt of a request on a node: what every role keeps of it.

It enters the engine here, and outputs of the engine become runs of tokens here.
"""

from __future__ import annotations

import dataclasses
import time

from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk
from common.errors import InvalidRequest, PdqError
from common.node.ports import NodeServices
from common.node.token_stream import ChoiceKey
from common.request import Request
from common.store.queue import Entry
from common.wire.messages import Dispatch, Offer, TokenLogprobs, TokenRun

ALONE_TOKENS = 4


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """`entry` is None where the request came by a handoff; `open_choices` are not over yet."""

    request: Request  # a sequence may be given less to do
    number: int
    entry: Entry | None
    open_choices: set[int]
    alone: bool  # a suspect: computed alone until it is past the failed step's position
    sequences: dict[int, Sequence] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.monotonic)
    arrived: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each choice that came by a handoff: the first position whose token is made here."""
    handoffs: dict[int, float] = dataclasses.field(default_factory=dict)  # seconds, by choice
    cached_tokens: int | None = None  # of the prompt; None until its first chunk begins

    @property
    def engine_id(self) -> str:
        return self.key(0).engine_id

    def key(self, choice: int) -> ChoiceKey:
        return ChoiceKey(self.request.id, self.number, choice)

    @classmethod
    def of(cls, entry: Entry) -> Attempt:
        dispatch: Dispatch = entry.dispatch
        choices = set(dispatch.choices)
        return cls(dispatch.request, dispatch.attempt, entry, choices, dispatch.alone)

    @classmethod
    def offered(cls, offer: Offer) -> Attempt:
        """The attempt of an offer; none of its choices is here yet."""
        return cls(offer.request, offer.key.attempt, None, set(), offer.alone)

    @property
    def gateway(self) -> str:
        return self.request.gateway

    def compute(self, node: NodeServices, request: Request) -> bool:
        """Queue the entry's choices in the node's engine, which is to do `request`. False if they can never
        run: then the gateway was told, and the entry is deleted."""
        assert self.entry is not None
        dispatch = self.entry.dispatch
        try:
            sequences = node.engine.add(
                self.engine_id, request, choices=dispatch.choices, block_hashes=self.entry.block_hashes
            )
        except InvalidRequest as error:
            self.give_up(node, error, retryable=False)
            node.done(self.entry)
            return False
        self.sequences = {sequence.choice: sequence for sequence in sequences}
        self.suspect(node, len(self.request.token_ids))
        return True

    def give_up(self, node: NodeServices, error: PdqError, *, retryable: bool) -> None:
        """Tell the gateway, of each choice that is not over, that it ends here."""
        for choice in sorted(self.open_choices):
            node.gateways.fail(self.gateway, self.key(choice), error, retryable=retryable)

    def suspect(self, node: NodeServices, known: int) -> None:
        """Compute a suspect alone until ALONE_TOKENS after its `known` tokens: the last tokens that a node
        made may not have reached the gateway before the node died."""
        if self.alone:
            node.suspects.suspect(self.engine_id, known + ALONE_TOKENS)

    def begins(self, node: NodeServices, chunk: Chunk) -> None:
        """Tell the gateway, once, how much of the prompt the prefix cache had."""
        if self.cached_tokens is None and chunk.is_prompt:
            self.cached_tokens = chunk.start
            waited = {"queue": time.monotonic() - self.began}
            key = self.key(chunk.sequence.choice)
            node.gateways.stage(self.gateway, key, "prefilling", waited, chunk.start)

    def run(self, output: StepOutput) -> TokenRun:
        """The run of tokens that the gateway gets for one output of the engine."""
        reason = "" if output.finish_reason is None else output.finish_reason.value
        return TokenRun(
            self.request.id,
            self.number,
            output.choice,
            output.position,
            output.token_ids,
            tuple(
                TokenLogprobs(
                    entry.logprob,
                    entry.rank,
                    tuple(i for i, _ in entry.top),
                    tuple(value for _, value in entry.top),
                )
                for entry in output.logprobs
            ),
            reason,
            output.drafted,
            output.accepted,
        )
