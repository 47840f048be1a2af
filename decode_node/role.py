"""The decode role: runs sequences that arrive by handoff, with KV and first token, to their end.

Owns the attempts that decode here. As `unified`, and whenever a gateway sends it a request while it idles, it
computes the prompt itself. Admission is the engine's (common/engine/core/admission.py): an offer is
granted a slot and room for its whole prompt, or waits, and its sequence runs from the next step on.
When the node drains, what runs moves to other decode nodes (moves.py), as far as they have room.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Set as AbstractSet

from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk, Step
from common.errors import PdqError
from common.node.attempt import Attempt
from common.node.ports import NodeServices
from common.node.token_stream import ChoiceKey
from common.sampling import FinishReason
from common.store.queue import Entry
from common.wire.messages import Offer, TokenRun, TookOver
from decode_node.moves import Moves
from kv_transfer.ports import Adopted


def create(node: NodeServices) -> DecodeRole:
    return DecodeRole(node)


class DecodeRole:
    """Implements `NodeRole`."""

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._attempts: dict[str, Attempt] = {}  # by the engine's id
        self._moves = Moves(node, self._attempts, self._moved, self._give_up)

    @property
    def num_open(self) -> int:
        attempts = self._attempts.keys() | self._moves.attempts
        return len(attempts) + len(self._node.links.intakes())

    def capacity(self) -> int:
        scheduler = self._node.engine.scheduler
        return min(8, scheduler.num_free_slots - scheduler.num_waiting)

    def accept(self, entry: Entry) -> None:
        """Compute a whole request here, prompt and all."""
        attempt = Attempt.of(entry)
        if attempt.engine_id in self._attempts:  # Redis lost it, and its gateway queued it again
            self._node.done(entry)
            return
        if not attempt.compute(self._node, attempt.request):
            return
        self._attempts[attempt.engine_id] = attempt
        for choice in attempt.sequences:
            self._say_who_has(attempt, choice)

    def arrived(self, adopted: Adopted) -> None:
        """Run a sequence that is here with its KV, and tell its gateway who has it now."""
        node, offer, commit = self._node, adopted.offer, adopted.commit
        attempt = Attempt.offered(offer)
        attempt = self._attempts.setdefault(attempt.engine_id, attempt)
        if offer.key.choice in attempt.open_choices:  # its Ack was lost, and it was offered again
            node.kv.discard(adopted.reservation)
            self._say_who_has(attempt, offer.key.choice)
            return
        try:
            node.connect(offer.request.gateway, offer.request.gateway_endpoint)
            known = (*offer.request.token_ids, commit.first_token)
            request = dataclasses.replace(offer.request, token_ids=known)
            sequence = node.engine.make_sequence(attempt.engine_id, request, offer.key.choice)
            sequence.num_computed = len(offer.request.token_ids)
            if node.engine.layout.num_draft:
                sequence.num_draft_computed = max(0, min(sequence.num_computed, commit.draft_positions))
            sequence.block_hashes = list(offer.block_hashes)  # each checked by the intake
            node.kv.run(sequence, adopted.reservation)
        except PdqError as error:
            node.kv.discard(adopted.reservation)
            node.gateways.fail(offer.request.gateway, attempt.key(offer.key.choice), error, retryable=True)
            self._close_if_over(attempt)
            return
        attempt.suspect(node, len(sequence.token_ids))
        attempt.open_choices.add(offer.key.choice)
        attempt.sequences[offer.key.choice] = sequence
        attempt.arrived[offer.key.choice] = len(sequence.token_ids)
        attempt.handoffs[offer.key.choice] = adopted.waited
        self._say_who_has(attempt, offer.key.choice)

    def _say_who_has(self, attempt: Attempt, choice: int) -> None:
        node, key = self._node, attempt.key(choice)
        if attempt.entry is not None:
            node.gateways.stage(attempt.gateway, key, "prefilling", {})
            return
        node.gateways.send(attempt.gateway, TookOver(node.incarnation, *key, attempt.arrived[choice]))

    def may_go_on(self, sequence: Sequence) -> bool:
        return not self._moves.is_to_pause(sequence)

    def step_begins(self, step: Step) -> None:
        for chunk in step.chunks:
            attempt = self._attempts.get(chunk.sequence.request_id)
            if attempt is not None and attempt.entry is not None:
                attempt.begins(self._node, chunk)

    def handed_off(self, step: Step) -> list[Chunk]:
        """This role hands no chunk off."""
        return []

    def step_filled(self, chunks: list[Chunk]) -> None:
        """This role hands no chunk off."""

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None:
        runs: list[tuple[str, TokenRun]] = []
        ended: list[tuple[Attempt, StepOutput]] = []
        for output in outputs:
            attempt = self._attempts.get(output.request_id)
            if attempt is None:
                continue  # aborted while the step ran
            if output.error is not None:
                key = attempt.key(output.choice)
                self._node.gateways.fail(attempt.gateway, key, output.error, retryable=False)
            else:
                runs.append((attempt.gateway, attempt.run(output)))
            if output.finish_reason is not None:
                ended.append((attempt, output))
        self._node.gateways.tokens.push(runs)
        for attempt, output in ended:
            if output.finish_reason is not FinishReason.ERROR:
                seconds = {"decode": time.monotonic() - attempt.began}
                if output.choice in attempt.handoffs:
                    seconds["handoff"] = attempt.handoffs[output.choice]
                key = attempt.key(output.choice)
                self._node.gateways.stage(attempt.gateway, key, "decoding", seconds)
            attempt.open_choices.discard(output.choice)
            self._close_if_over(attempt)
        self._moves.step_ended()

    def drain(self) -> None:
        self._moves.begin()

    def _give_up(self, attempt: Attempt, error: PdqError, *, retryable: bool = True) -> None:
        """End this attempt here; its gateway may make another."""
        attempt.give_up(self._node, error, retryable=retryable)
        self._abort(attempt, error.code)

    def _moved(self, attempt: Attempt, choice: int) -> None:
        attempt.open_choices.discard(choice)
        self._close_if_over(attempt)

    def give_up(self, engine_id: str, error: PdqError, *, retryable: bool) -> None:
        attempt = self._attempts.get(engine_id)
        if attempt is not None:
            self._give_up(attempt, error, retryable=retryable)

    def cancel(
        self, gateway: str, request: str, attempt: int, reason: str, choices: AbstractSet[int] = frozenset()
    ) -> None:
        def wanted(offer: Offer) -> bool:
            key, theirs = offer.key, offer.request.gateway == gateway
            chosen = not choices or key.choice in choices
            return theirs and chosen and key.request == request and key.attempt <= attempt

        self._node.links.refuse(wanted, reason)
        for open_attempt in list(self._attempts.values()):
            theirs = (open_attempt.gateway, open_attempt.request.id) == (gateway, request)
            if not theirs or open_attempt.number > attempt:
                continue
            if not choices or open_attempt.open_choices <= choices:
                self._abort(open_attempt, reason)
                continue
            for choice in open_attempt.open_choices & choices:
                if self._node.engine.abort_choice(open_attempt.engine_id, choice):
                    self._moves.cancel(open_attempt, reason, choice)
                    self._moved(open_attempt, choice)
            self._node.wake()

    def holds(self, key: ChoiceKey) -> bool:
        attempt = self._attempts.get(key.engine_id)
        return attempt is not None and key.choice in attempt.open_choices

    def gateway_linked(self, gateway: str) -> None:
        for attempt in self._attempts.values():
            if attempt.gateway == gateway:
                for choice in attempt.open_choices:
                    self._say_who_has(attempt, choice)

    def peers_changed(self) -> None:
        self._moves.peers_changed()

    def gateway_lost(self, gateway: str) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.gateway == gateway:
                self._abort(attempt, "gateway lost")

    def _abort(self, attempt: Attempt, reason: str) -> None:
        self._node.engine.abort(attempt.engine_id)
        self._moves.cancel(attempt, reason)
        attempt.open_choices.clear()
        self._close_if_over(attempt)

    def _close_if_over(self, attempt: Attempt) -> None:
        if not attempt.open_choices and self._attempts.pop(attempt.engine_id, None) is not None:
            if attempt.entry is not None:
                self._node.done(attempt.entry)
            self._node.wake()
