"""The prefill role: computes prompts from the queue, chunk by chunk, and hands them off to decode nodes.

Owns the attempts that are computed here, or on their way to a decode node (common/node/departure.py).
A prompt is offered while it is computed (offer_times.py says when), and finished chunks are announced. Its
first token goes straight to the gateway; then its sequence ends, and its blocks are held until a decode node
has adopted them. A prompt that is refused is offered to another decode node; where all are full, or there is
none for a while, the gateway hears that it failed, and decides.

The choices after the first are offered when the first has been adopted: by then the decode node
holds the prompt's blocks, and only the tail is sent again.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import time
from collections.abc import Set as AbstractSet

from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk, Step
from common.errors import OutOfBlocks, PdqError, ServiceUnavailable, TransferError
from common.node.attempt import Attempt
from common.node.departure import State
from common.node.ports import NodeServices
from common.node.sender import Departure, Sender
from common.node.token_stream import ChoiceKey
from common.request import Request
from common.sampling import FinishReason
from common.store.queue import Entry
from common.wire.messages import Dispatch, TokenRun
from kv_transfer.ports import Adopted
from prefill_node.offer_times import OfferTimes

ENDED_REMEMBERED = 4096  # attempts


def create(node: NodeServices) -> PrefillRole:
    return PrefillRole(node)


class PrefillRole:
    """Implements `NodeRole`, and `Owner` of its departures."""

    no_decode_node_s = 1.0  # a prompt waits so long for a decode node to appear, then it fails

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._attempts: dict[str, Attempt] = {}  # by the engine's id
        self._departures: dict[tuple[str, int], Departure] = {}  # by the engine's id, and choice
        self._sender = Sender(node, self)
        self._offer_times = OfferTimes(node.engine.layout.bytes_per_token)
        self._step_began = 0.0
        self._past: collections.deque[str] = collections.deque(maxlen=ENDED_REMEMBERED)

    @property
    def num_open(self) -> int:
        return len(self._attempts)

    def capacity(self) -> int:
        """As many entries as fill the next steps: another node can take those that are not read."""
        engine = self._node.engine
        waiting = engine.scheduler.waiting
        ahead = sum(len(sequence.token_ids) for sequence in waiting)
        if ahead >= engine.facts.max_num_batched_tokens:
            return 0
        return min(8, engine.facts.max_num_seqs - engine.scheduler.num_running - len(waiting))

    # The prompt.

    def accept(self, entry: Entry) -> None:
        node = self._node
        attempt = Attempt.of(entry)
        if attempt.engine_id in self._attempts or attempt.engine_id in self._past:
            node.done(entry)  # Redis lost it, and its gateway queued it again
            return
        if not attempt.compute(node, _for_prefill(attempt.request)):
            return
        self._attempts[attempt.engine_id] = attempt
        for choice, sequence in attempt.sequences.items():
            sequence.speculates = False  # there is room for one token, and two would end the reply here
            departure = Departure(attempt, sequence, len(entry.dispatch.request.token_ids))
            self._departures[attempt.engine_id, choice] = departure
            node.gateways.stage(attempt.gateway, attempt.key(choice), "prefilling", {})

    def may_go_on(self, sequence: Sequence) -> bool:
        """A sequence that gets its first token ends here."""
        return not sequence.pending

    def step_begins(self, step: Step) -> None:
        """Offer the prompts whose time has come, or comes during this step."""
        self._step_began = time.monotonic()
        for chunk in step.chunks:
            departure = self._computing(chunk)
            if departure is None:
                continue
            departure.attempt.begins(self._node, chunk)
            if not departure.is_idle:
                continue
            due_s = self._offer_times.until_due(step, chunk, departure.length)
            if not due_s:
                self._ask(departure)
            elif due_s < math.inf:
                asyncio.get_running_loop().call_later(due_s, self._offer_is_due, departure)

    def _offer_is_due(self, departure: Departure) -> None:
        if departure.is_idle and departure.is_wanted:
            self._ask(departure)

    def handed_off(self, step: Step) -> list[Chunk]:
        return [
            chunk
            for chunk in step.chunks
            if (departure := self._computing(chunk)) is not None and not _ends_at_first(departure.attempt)
        ]

    def step_filled(self, chunks: list[Chunk]) -> None:
        """The peer copies the blocks, the last ones too, while the step chooses the first token."""
        for chunk in chunks:
            if (departure := self._departure(chunk)) is not None:
                self._sender.filled(departure, chunk.end)

    def _departure(self, chunk: Chunk) -> Departure | None:
        return self._departures.get((chunk.sequence.request_id, chunk.sequence.choice))

    def _computing(self, chunk: Chunk) -> Departure | None:
        """The departure of a prompt that has no first token and is still wanted."""
        departure = self._departure(chunk)
        return departure if departure is not None and departure.is_computing else None

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None:
        self._offer_times.took(step, time.monotonic() - self._step_began)
        first_runs: list[tuple[str, TokenRun]] = []
        for output in outputs:
            departure = self._departures.get((output.request_id, output.choice))
            if departure is not None:
                first_runs += self._first_token(departure, output)
        self._node.gateways.tokens.push(first_runs)
        for chunk in step.chunks:  # the link of some was not open when they were filled
            if (departure := self._computing(chunk)) is not None:
                self._sender.filled(departure, departure.sequence.num_computed)

    def _first_token(self, departure: Departure, output: StepOutput) -> list[tuple[str, TokenRun]]:
        """The prompt is computed: the token goes to the gateway, the blocks are held."""
        attempt, node, sequence = departure.attempt, self._node, departure.sequence
        key = attempt.key(output.choice)
        if output.error is not None:
            node.gateways.fail(attempt.gateway, key, output.error, retryable=False)
            self._over(departure, "failed")
            return []
        run = attempt.run(output)
        seconds = {"prefill": time.monotonic() - attempt.began}
        if output.finish_reason is not None:  # the first may be the last
            node.gateways.stage(attempt.gateway, key, "prefilling", seconds)
            self._over(departure, "finished")
        elif not sequence.block_table:  # a choice that found no slot beside the first
            node.engine.finish(sequence, FinishReason.CANCELLED)
            error = OutOfBlocks("no slot for this choice beside the others")
            node.gateways.fail(attempt.gateway, key, error, retryable=True)
            self._over(departure, "no slot")
            return []
        else:
            self._sender.computed(departure, run.logprobs[0] if run.logprobs else None)
            if departure.state is State.HELD:
                self._ask(departure)
            node.gateways.stage(attempt.gateway, key, "handing_off", seconds)
        return [(attempt.gateway, run)]

    # Its departure.

    def _ask(self, departure: Departure) -> None:
        """Ask a decode node to take the prompt, when its choice's turn has come."""
        if _ends_at_first(departure.attempt) or not self._is_next(departure):
            return
        if self._sender.ask(departure):
            return
        if departure.found_full:
            self._give_up(departure.attempt, OutOfBlocks("no decode node has room for it"))
        elif departure.stranded_since is None:
            departure.stranded_since = time.monotonic()

    def peers_changed(self) -> None:
        """Look again for prompts that found no decode node to ask, for a while."""
        now = time.monotonic()
        for departure in list(self._departures.values()):
            since = departure.stranded_since
            if since is None or not departure.is_idle:
                continue
            if now - since < self.no_decode_node_s:
                departure.refused.clear()
                self._ask(departure)
            else:
                self._give_up(departure.attempt, ServiceUnavailable("there is no decode node"))

    def _give_up(self, attempt: Attempt, error: PdqError, *, retryable: bool = True) -> None:
        """End this attempt here; its gateway may make another."""
        attempt.give_up(self._node, error, retryable=retryable)
        self._abort(attempt, error.code)

    def _is_next(self, departure: Departure) -> bool:
        """Whether no choice before this one is still on its way."""
        return departure.sequence.choice == min(departure.attempt.open_choices, default=None)

    def choose(self, departure: Departure) -> tuple[str, str] | None:
        """The node that the gateway chose, unless it is lost or has refused, or else the decode node with
        the most free positions."""
        dispatch, node = _dispatch(departure.attempt), self._node
        chosen = dispatch.decode_node
        if chosen and chosen not in departure.refused and not node.peers.is_lost(chosen):
            return chosen, dispatch.decode_endpoint
        candidates = node.peers.decoding(departure.refused)
        if not candidates:
            return None
        best = max(candidates, key=lambda one: one.free_blocks * one.block_size)  # positions
        return best.incarnation, best.endpoint

    def linked(self, departure: Departure) -> None:
        self._sender.offer(departure)

    def await_grant(self, departure: Departure) -> None:
        """A prompt waits as long as the decode node lets it."""

    def granted(self, departure: Departure) -> None:
        departure.stranded_since = None

    def adopted(self, departure: Departure) -> None:
        self._choice_over(departure)

    def refused(self, departure: Departure) -> None:
        self._ask(departure)

    def spoiled(self, departure: Departure) -> None:
        self._give_up(departure.attempt, TransferError(f"its blocks: {departure.reason}"))

    def drain(self) -> None:
        """What is here is handed off anyway."""

    # Ends.

    def _over(self, departure: Departure, reason: str) -> None:
        """End this choice here."""
        self._sender.cancel(departure, reason)
        self._choice_over(departure)

    def _choice_over(self, departure: Departure) -> None:
        attempt = departure.attempt
        attempt.open_choices.discard(departure.sequence.choice)
        for index in sorted(attempt.open_choices)[:1]:
            following = self._departures[attempt.engine_id, index]
            if following.state is State.HELD:
                self._ask(following)

    def over(self, departure: Departure) -> None:
        attempt = departure.attempt
        del self._departures[attempt.engine_id, departure.sequence.choice]
        if not any(name == attempt.engine_id for name, _ in self._departures):
            del self._attempts[attempt.engine_id]
            self._past.append(attempt.engine_id)
            assert attempt.entry is not None
            self._node.done(attempt.entry)
            self._node.wake()

    def arrived(self, adopted: Adopted) -> None:
        """Discard it: this role adopts nothing, and nodes offer to those that decode."""
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
                departure = self._departures[other.engine_id, choice]
                if not departure.is_computing or self._node.engine.abort_choice(other.engine_id, choice):
                    self._over(departure, reason)

    def holds(self, key: ChoiceKey) -> bool:
        departure = self._departures.get((key.engine_id, key.choice))
        return departure is not None and departure.is_wanted

    def gateway_linked(self, gateway: str) -> None:
        for departure in self._departures.values():
            if departure.attempt.gateway == gateway and departure.is_wanted:
                key = departure.attempt.key(departure.sequence.choice)
                self._node.gateways.stage(gateway, key, "prefilling", {})

    def gateway_lost(self, gateway: str) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.gateway == gateway:
                self._abort(attempt, "gateway lost")

    def _abort(self, attempt: Attempt, reason: str) -> None:
        self._node.engine.abort(attempt.engine_id)
        attempt.open_choices.clear()
        for (engine_id, _), departure in list(self._departures.items()):
            if engine_id == attempt.engine_id:
                self._sender.cancel(departure, reason)


def _for_prefill(request: Request) -> Request:
    """What this node computes of it: one token."""
    params = request.params
    most = min(params.max_tokens, request.num_delivered + 2)
    params = dataclasses.replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
    return dataclasses.replace(request, params=params, prediction=())


def _ends_at_first(attempt: Attempt) -> bool:
    """Whether the first token is the last by its parameters; then nobody needs the KV."""
    return attempt.request.num_delivered + 1 >= attempt.request.params.max_tokens


def _dispatch(attempt: Attempt) -> Dispatch:
    assert attempt.entry is not None
    return attempt.entry.dispatch
