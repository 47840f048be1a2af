"""The prefill role: prompts from the queue, chunk by chunk, their blocks on to a decode node.

Owns the attempts that are computed or handed over here. For each choice:

    queue ──accept──▶ computing ──first chunk begins──▶ offered; finished chunks are announced
                         │ first token, straight to the gateway; the sequence ends here,
                         ▼ its blocks are held
                      handing over ──Ended(adopted)──▶ over: the blocks go (they stay as cache)
                         │ denied, failed, link lost
                         ▼
                      another decode node; where all are full, or there is none for a while,
                      Failed to the gateway, which decides

The choices after the first are offered when the first has been adopted: by then the decode node
holds the prompt's blocks, and only the tail is sent again.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Set as AbstractSet

from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk, Step
from common.errors import OutOfBlocks, PdqError, ServiceUnavailable, TransferError
from common.node.attempt import Attempt
from common.node.handover import Handover, Handovers
from common.node.ports import NodeServices
from common.node.token_stream import ChoiceKey
from common.sampling import FinishReason, SamplingParams
from common.store.queue import Entry
from common.wire.messages import Dispatch, TokenRun
from kv_transfer.ports import Adopted

NO_DECODE_NODE_S = 1.0  # a prompt waits so long for one to appear, then its gateway is told
ENDED_REMEMBERED = 4096  # attempts


def create(node: NodeServices) -> PrefillRole:
    return PrefillRole(node)


class PrefillRole:
    """Implements `NodeRole`, and `Owner` of its handovers."""

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._attempts: dict[str, Attempt] = {}  # by the engine's id
        self._handovers: dict[tuple[str, int], Handover] = {}  # by the engine's id, and choice
        self._sending = Handovers(node, self)
        self._stranded: dict[Handover, float] = {}  # which find nobody to ask, and since when
        self._past: collections.deque[str] = collections.deque(maxlen=ENDED_REMEMBERED)

    @property
    def num_open(self) -> int:
        return len(self._attempts)

    def capacity(self) -> int:
        """Enough to fill the next steps, no more: what is not read can move to another node."""
        engine = self._node.engine
        waiting = engine.scheduler.waiting
        ahead = sum(len(sequence.token_ids) for sequence in waiting)
        if ahead >= engine.settings.max_num_batched_tokens:
            return 0
        return min(8, engine.settings.max_num_seqs - engine.scheduler.num_running - len(waiting))

    # The prompt.

    def accept(self, entry: Entry) -> None:
        node = self._node
        attempt = Attempt.of(entry)
        if attempt.engine_id in self._attempts or attempt.engine_id in self._past:
            node.done(entry)  # Redis lost it, and its gateway queued it again
            return
        if not attempt.compute(node, _for_prefill(entry.dispatch)):
            return
        self._attempts[attempt.engine_id] = attempt
        for choice, sequence in attempt.sequences.items():
            handover = Handover(attempt, sequence, len(entry.dispatch.request.token_ids))
            self._handovers[attempt.engine_id, choice] = handover
            node.gateways.stage(attempt.gateway, attempt.key(choice), "prefilling", {})

    def may_go_on(self, sequence: Sequence) -> bool:
        """One that gets its first token ends here."""
        return not sequence.pending

    def step_begins(self, step: Step) -> None:
        """A prompt whose first chunk begins is offered: the room is asked for meanwhile."""
        for chunk in step.chunks:
            handover = self._handovers.get((chunk.sequence.request_id, chunk.sequence.choice))
            if handover is None or handover.is_complete:
                continue
            handover.attempt.begins(self._node, chunk)
            if not handover.peer:
                self._offer(handover)

    def handed_over(self, step: Step) -> list[Chunk]:
        return [
            chunk
            for chunk in step.chunks
            if (handover := self._computing(chunk)) is not None and not _ends_at_first(handover.attempt)
        ]

    def step_filled(self, chunks: list[Chunk]) -> None:
        """The peer copies the blocks, the last ones too, while the step chooses the first token."""
        for chunk in chunks:
            if (handover := self._computing(chunk)) is not None:
                self._sending.announce(handover, chunk.end)

    def _computing(self, chunk: Chunk) -> Handover | None:
        """Whose prompt it is, while that has no first token and is still wanted."""
        handover = self._handovers.get((chunk.sequence.request_id, chunk.sequence.choice))
        if handover is None or handover.is_complete or handover.cancelled:
            return None
        return handover

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None:
        first_runs: list[tuple[str, TokenRun]] = []
        for output in outputs:
            handover = self._handovers.get((output.request_id, output.choice))
            if handover is not None:
                first_runs += self._first_token(handover, output)
        self._node.gateways.tokens.push(first_runs)
        for chunk in step.chunks:  # of a link that has opened since they were filled
            if (handover := self._computing(chunk)) is not None:
                self._sending.announce(handover, handover.sequence.num_computed)

    def _first_token(self, handover: Handover, output: StepOutput) -> list[tuple[str, TokenRun]]:
        """The prompt is computed: the token goes to the gateway, the blocks are held."""
        attempt, node, sequence = handover.attempt, self._node, handover.sequence
        key = attempt.key(output.choice)
        if output.error is not None:
            node.gateways.fail(attempt.gateway, key, output.error, retryable=False)
            self._over(handover, "failed")
            return []
        run = attempt.run(output)
        seconds = {"prefill": time.monotonic() - attempt.began}
        if output.finish_reason is not None:  # the first may be the last
            node.gateways.stage(attempt.gateway, key, "prefilling", seconds)
            self._over(handover, "finished")
        else:
            handover.held = node.engine.finish(sequence, FinishReason.LENGTH)
            if not handover.held:  # a choice that found no slot beside the first
                error = OutOfBlocks("no slot for this choice beside the others")
                node.gateways.fail(attempt.gateway, key, error, retryable=True)
                self._over(handover, "no slot")
                return []
            asked = bool(handover.peer)
            self._sending.complete(handover, run.logprobs[0] if run.logprobs else None)
            if not asked:
                self._offer(handover)
            node.gateways.stage(attempt.gateway, key, "handing_off", seconds)
        return [(attempt.gateway, run)]

    # The handover.

    def _offer(self, handover: Handover) -> None:
        """Offer the prompt to a decode node, when its choice's turn has come."""
        if _ends_at_first(handover.attempt) or not self._is_next(handover):
            return
        if self._sending.offer(handover):
            return
        if handover.found_full:
            self._give_up(handover.attempt, OutOfBlocks("no decode node has room for it"))
        else:
            self._stranded.setdefault(handover, time.monotonic())

    def peers_changed(self) -> None:
        """Look again for prompts that found no decode node to ask, for a while."""
        now = time.monotonic()
        for handover, since in list(self._stranded.items()):
            if handover.cancelled or handover.peer:
                continue
            if now - since < NO_DECODE_NODE_S:
                handover.refused.clear()
                self._offer(handover)
            else:
                self._give_up(handover.attempt, ServiceUnavailable("there is no decode node"))

    def _give_up(self, attempt: Attempt, error: PdqError, *, retryable: bool = True) -> None:
        """Nothing more of this attempt here; its gateway may make another."""
        attempt.give_up(self._node, error, retryable=retryable)
        self._abort(attempt, error.code)

    def _is_next(self, handover: Handover) -> bool:
        """Whether no choice before this one is still on its way."""
        choices = sorted(handover.attempt.open_choices)
        return handover.sequence.choice == choices[0]

    def choose(self, handover: Handover) -> tuple[str, str] | None:
        """The gateway's choice, unless that is known to be lost; else the decode node with the most
        free positions."""
        dispatch, node = _dispatch(handover.attempt), self._node
        chosen = dispatch.decode_node
        if chosen and chosen not in handover.refused and not node.peers.is_lost(chosen):
            return chosen, dispatch.decode_endpoint
        candidates = node.peers.decoding(handover.refused)
        if not candidates:
            return None
        best = max(candidates, key=lambda one: one.free_blocks * one.block_size)  # positions
        return best.incarnation, best.endpoint

    def opened(self, handover: Handover, link: str) -> None:
        self._sending.send_offer(handover, link)

    def granted(self, handover: Handover) -> None:
        self._stranded.pop(handover, None)

    def adopted(self, handover: Handover) -> None:
        self._over(handover, "adopted")

    def refused(self, handover: Handover, peer: str) -> None:
        if handover.spoiled:
            self._give_up(handover.attempt, TransferError(f"its blocks: {handover.spoiled}"))
        else:
            self._offer(handover)

    def drain(self) -> None:
        """What is here is handed over anyway."""

    # Ends.

    def _over(self, handover: Handover, reason: str) -> None:
        """This choice needs nothing more here."""
        attempt, choice = handover.attempt, handover.sequence.choice
        attempt.open_choices.discard(choice)
        self._sending.cancel(handover, reason)
        for index in sorted(attempt.open_choices)[:1]:
            other = self._handovers[attempt.engine_id, index]
            if other.is_complete and not other.peer:
                self._offer(other)

    def dropped(self, handover: Handover) -> None:
        """Nothing of this choice is under way: its blocks go."""
        attempt, choice = handover.attempt, handover.sequence.choice
        if self._handovers.pop((attempt.engine_id, choice), None) is None:
            return
        self._stranded.pop(handover, None)
        self._node.engine.pool.release(handover.held)
        handover.held = []
        if not any(id_ == attempt.engine_id for id_, _ in self._handovers):
            del self._attempts[attempt.engine_id]
            self._past.append(attempt.engine_id)
            assert attempt.entry is not None
            self._node.done(attempt.entry)
            self._node.wake()

    def arrived(self, adopted: Adopted) -> None:
        """This role takes nothing over: nodes offer to those that decode."""
        self._node.kv.discard(adopted.reservation)

    def give_up(self, engine_id: str, error: PdqError, *, retryable: bool) -> None:
        attempt = self._attempts.get(engine_id)
        if attempt is not None:
            self._give_up(attempt, error, retryable=retryable)

    def cancel(
        self, gateway: str, request: str, attempt: int, reason: str, choices: AbstractSet[int] = frozenset()
    ) -> None:
        for other in list(self._attempts.values()):
            theirs = (other.gateway, other.request.id) == (gateway, request)
            if not theirs or other.number > attempt:
                continue
            if not choices or other.open_choices <= choices:
                self._abort(other, reason)
                continue
            for choice in sorted(other.open_choices & choices):
                handover = self._handovers[other.engine_id, choice]
                ended = handover.is_complete
                if ended or self._node.engine.abort_choice(other.engine_id, choice):
                    self._over(handover, reason)

    def holds(self, key: ChoiceKey) -> bool:
        handover = self._handovers.get((key.engine_id, key.choice))
        return handover is not None and not handover.cancelled

    def gateway_linked(self, gateway: str) -> None:
        for handover in self._handovers.values():
            if handover.attempt.gateway == gateway and not handover.cancelled:
                key = handover.attempt.key(handover.sequence.choice)
                self._node.gateways.stage(gateway, key, "prefilling", {})

    def gateway_lost(self, gateway: str) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.gateway == gateway:
                self._abort(attempt, "gateway lost")

    def _abort(self, attempt: Attempt, reason: str) -> None:
        self._node.engine.abort(attempt.engine_id)
        attempt.open_choices.clear()
        for (engine_id, _), handover in list(self._handovers.items()):
            if engine_id == attempt.engine_id:
                self._sending.cancel(handover, reason)


def _for_prefill(dispatch: Dispatch) -> SamplingParams:
    """The same choice of the next token, with room for one more at most in this pool."""
    params = dispatch.request.params
    most = min(params.max_tokens, dispatch.request.num_delivered + 2)
    return dataclasses.replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def _ends_at_first(attempt: Attempt) -> bool:
    """Whether the first token is the last by its parameters; then nobody needs the KV."""
    return attempt.request.num_delivered + 1 >= attempt.request.params.max_tokens


def _dispatch(attempt: Attempt) -> Dispatch:
    assert attempt.entry is not None
    return attempt.entry.dispatch
