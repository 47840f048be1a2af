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

from common.engine.engine import PlannedStep
from common.engine.output import StepOutput
from common.engine.sequence import Sequence
from common.errors import InvalidRequest, OutOfBlocks, PdqError, ServiceUnavailable
from common.logs import get_logger
from common.messages import Dispatch, Offer, TokenLogprobs, TokenRun, TookOver
from common.node.attempt import Attempt
from common.node.runtime import Node
from common.queue import Entry
from common.registry import NodeState, Role
from common.sampling import FinishReason, SamplingParams
from kv_transfer.ports import Adopted, Ended, Granted, Key, Outcome

log = get_logger("prefill")

NO_DECODE_NODE_S = 1.0  # a prompt waits so long for one to appear, then its gateway is told
FULL = frozenset({"out_of_blocks", "overloaded"})  # reasons of a Deny that pass by themselves
ENDED_REMEMBERED = 4096  # attempts


def create(node: Node) -> PrefillRole:
    return PrefillRole(node)


@dataclasses.dataclass(slots=True, eq=False)
class Handover:
    """One choice on its way to a decode node."""

    attempt: Attempt
    sequence: Sequence
    peer: str = ""  # where it is offered, or about to be
    key: Key | None = None  # of the handoff that is under way
    announced: int = 0  # blocks given to that handoff
    first: TokenRun | None = None
    held: list[int] = dataclasses.field(default_factory=list)  # blocks of the ended sequence
    refused: set[str] = dataclasses.field(default_factory=set)  # nodes that did not take it
    found_full: bool = False  # one of them has no room just now
    stranded_at: float | None = None  # since when there is none to ask; None: one was asked
    cancelled: bool = False
    began: float = dataclasses.field(default_factory=time.monotonic)


class PrefillRole:
    """Implements `NodeRole`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._attempts: dict[str, Attempt] = {}  # by the engine's id
        self._handovers: dict[tuple[str, int], Handover] = {}  # by the engine's id, and choice
        self._by_key: dict[Key, Handover] = {}
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
        dispatch, node = entry.dispatch, self._node
        attempt = Attempt.of(entry)
        if attempt.engine_id in self._attempts or attempt.engine_id in self._past:
            node.done(entry)  # Redis lost it, and its gateway queued it again
            return
        try:
            sequences = node.engine.add(
                attempt.engine_id, dispatch.token_ids, _for_prefill(dispatch),
                choices=dispatch.choices, prompt_len=dispatch.prompt_len,
                priority=dispatch.priority, cache_salt=dispatch.cache_salt,
            )  # fmt: skip
        except InvalidRequest as error:
            for choice in dispatch.choices:
                node.failed(attempt.gateway, attempt.key(choice), error, retryable=False)
            node.done(entry)
            return
        self._attempts[attempt.engine_id] = attempt
        for sequence in sequences:
            attempt.sequences[sequence.choice] = sequence
            handover = Handover(attempt, sequence)
            self._handovers[attempt.engine_id, sequence.choice] = handover
            node.stage(attempt.gateway, attempt.key(sequence.choice), "prefilling", {})

    def step_begins(self, planned: PlannedStep) -> None:
        """A prompt whose first chunk begins is offered: the room is asked for meanwhile."""
        for chunk in planned.step.chunks:
            handover = self._handovers.get((chunk.sequence.request_id, chunk.sequence.choice))
            if handover is None or handover.first is not None:
                continue
            self._node.prompt_begins(handover.attempt, chunk)
            if not handover.peer:
                self._offer(handover)

    def step_ended(self, planned: PlannedStep, outputs: list[StepOutput]) -> None:
        first_runs: list[tuple[str, TokenRun]] = []
        for output in outputs:
            handover = self._handovers.get((output.request_id, output.choice))
            if handover is not None:
                first_runs += self._first_token(handover, output)
        self._node.push_tokens(first_runs)
        for chunk in planned.step.chunks:
            handover = self._handovers.get((chunk.sequence.request_id, chunk.sequence.choice))
            if handover is not None and handover.first is None and not handover.cancelled:
                self._announce(handover)

    def _first_token(self, handover: Handover, output: StepOutput) -> list[tuple[str, TokenRun]]:
        """The prompt is computed: the token goes to the gateway, the blocks are held."""
        attempt, node, sequence = handover.attempt, self._node, handover.sequence
        key = attempt.key(output.choice)
        if output.error is not None:
            node.failed(attempt.gateway, key, output.error, retryable=False)
            self._over(handover, "failed")
            return []
        handover.first = attempt.run(output)
        seconds = {"prefill": time.monotonic() - attempt.began}
        if output.finish_reason is not None:  # the first may be the last
            node.stage(attempt.gateway, key, "prefilling", seconds)
            self._over(handover, "finished")
        else:
            handover.held = node.engine.finish(sequence, FinishReason.LENGTH)
            if not handover.held:  # a choice that found no slot beside the first
                error = OutOfBlocks("no slot for this choice beside the others")
                node.failed(attempt.gateway, key, error, retryable=True)
                self._over(handover, "no slot")
                return []
            node.stage(attempt.gateway, key, "handing_off", seconds)
            if handover.key is not None:
                self._announce(handover)
                self._finish(handover)
            elif not handover.peer and self._is_next(handover):
                self._offer(handover)
        return [(attempt.gateway, handover.first)]

    # The handoff.

    def _offer(self, handover: Handover) -> None:
        """Choose a decode node, for good unless it refuses, and offer the prompt to it."""
        if _ends_at_first(handover.attempt) or not self._is_next(handover):
            return
        chosen = self._choose(handover)
        if chosen is None:
            if handover.found_full:
                self._give_up(handover.attempt, OutOfBlocks("no decode node has room for it"))
            elif handover.stranded_at is None:
                handover.stranded_at = time.monotonic()
            return
        handover.peer, endpoint = chosen
        self._node.spawn(self._open(handover, handover.peer, endpoint))

    def peers_changed(self) -> None:
        """Look again for prompts that found no decode node to ask, for a while."""
        now = time.monotonic()
        for handover in list(self._handovers.values()):
            stranded_at = handover.stranded_at
            if stranded_at is None or handover.cancelled or handover.peer:
                continue
            if now - stranded_at < NO_DECODE_NODE_S:
                handover.refused.clear()
                self._offer(handover)
            else:
                self._give_up(handover.attempt, ServiceUnavailable("there is no decode node"))

    def _give_up(self, attempt: Attempt, error: PdqError) -> None:
        """Nothing more of this attempt here; its gateway makes another."""
        for choice in attempt.open_choices:
            self._node.failed(attempt.gateway, attempt.key(choice), error, retryable=True)
        self._abort(attempt, error.code)

    def _is_next(self, handover: Handover) -> bool:
        """Whether no choice before this one is still on its way."""
        choices = sorted(handover.attempt.open_choices)
        return handover.sequence.choice == choices[0]

    def _choose(self, handover: Handover) -> tuple[str, str] | None:
        """The gateway's choice; else the decode node with the most free blocks."""
        dispatch = _dispatch(handover.attempt)
        if dispatch.decode_node and dispatch.decode_node not in handover.refused:
            return dispatch.decode_node, dispatch.decode_endpoint
        if self._node.peers is None:
            return None
        candidates = [
            record
            for record in self._node.peers.of_role(Role.DECODE, Role.UNIFIED)
            if record.state is NodeState.READY and record.incarnation not in handover.refused
        ]
        if not candidates:
            return None
        best = max(candidates, key=lambda one: one.free_blocks * one.block_size)  # positions
        return best.incarnation, best.endpoint

    async def _open(self, handover: Handover, peer: str, endpoint: str) -> None:
        node = self._node
        try:
            node.connect(peer, endpoint)
            link = await node.links.open(peer)
        except PdqError as error:
            log.warning("link.refused", peer=peer, error=error)
            self._refused(handover, peer)
            return
        if handover.cancelled:
            self._drop(handover)
            return
        sequence, dispatch = handover.sequence, _dispatch(handover.attempt)
        block_size = node.engine.layout.block_size
        length = len(dispatch.token_ids)
        offer = Offer(
            link, dispatch.request, dispatch.attempt, sequence.choice, dispatch.token_ids,
            dispatch.prompt_len, dispatch.params,
            tuple(sequence.hashes(length // block_size, block_size)), length % block_size,
            dispatch.gateway, dispatch.gateway_endpoint, dispatch.cache_salt, dispatch.priority, 0,
        )  # fmt: skip
        handover.key = Key(link, dispatch.request, dispatch.attempt, sequence.choice)
        handover.announced = 0
        self._by_key[handover.key] = handover
        now = time.monotonic()
        try:
            effects = node.links.handoff.offer(offer, now=now, waited=now - handover.began)
        except KeyError:  # the link went down since it was opened
            self._ended(handover, peer)
            return
        node.links.perform(effects)
        self._announce(handover)
        if handover.first is not None:
            self._finish(handover)

    def _announce(self, handover: Handover) -> None:
        """Give the handoff the blocks that are complete by now; at the end also the tail."""
        if handover.key is None:
            return
        sequence, block_size = handover.sequence, self._node.engine.layout.block_size
        end = sequence.num_computed // block_size
        if handover.first is not None:
            end = -(-sequence.num_computed // block_size)
        if end <= handover.announced:
            return
        table = handover.held or sequence.block_table
        blocks = self._node.kv.ready_blocks(sequence, table, handover.announced, end)
        handover.announced = end
        now = time.monotonic()
        self._node.links.perform(self._node.links.handoff.ready(handover.key, blocks, now=now))

    def _finish(self, handover: Handover) -> None:
        """Commit; a send just before may have found the link down, and ended the handoff."""
        first = handover.first
        assert first is not None
        if handover.key is None:
            return
        logprobs: TokenLogprobs | None = first.logprobs[0] if first.logprobs else None
        self._node.links.perform(
            self._node.links.handoff.finished(
                handover.key, position=first.position, first_token=first.token_ids[0],
                logprobs=logprobs, now=time.monotonic(),
            )
        )  # fmt: skip

    def sent(self, effect: Granted | Ended) -> None:
        if isinstance(effect, Granted):
            if effect.key in self._by_key:
                self._by_key[effect.key].stranded_at = None
            return
        handover = self._by_key.pop(effect.key, None)
        if handover is None:
            return
        if handover.cancelled:
            self._drop(handover)
        elif effect.outcome is Outcome.ADOPTED:
            self._say_who_took_over(handover)
            self._over(handover, "adopted")
        else:
            if effect.outcome is Outcome.DENIED and effect.reason in FULL:
                handover.found_full = True
            log.info("handoff.ended", request=effect.key.request, outcome=effect.outcome.value,
                     reason=effect.reason, peer=handover.peer)  # fmt: skip
            self._ended(handover, handover.peer)

    def _say_who_took_over(self, handover: Handover) -> None:
        """The decode node says so too, but it may die between its Ack and that."""
        attempt, first = handover.attempt, handover.first
        assert first is not None
        key = attempt.key(handover.sequence.choice)
        self._node.send(attempt.gateway, TookOver(handover.peer, *key, first.position + 1))

    def _ended(self, handover: Handover, peer: str) -> None:
        """A handoff is over without success: the next decode node, if there is one."""
        if handover.key is not None:
            self._by_key.pop(handover.key, None)
        handover.key = None
        self._refused(handover, peer)

    def _refused(self, handover: Handover, peer: str) -> None:
        if handover.cancelled:
            self._drop(handover)
            return
        handover.refused.add(peer)
        handover.peer = ""
        self._offer(handover)

    # Ends.

    def _over(self, handover: Handover, reason: str) -> None:
        """This choice needs nothing more here."""
        attempt, choice = handover.attempt, handover.sequence.choice
        attempt.open_choices.discard(choice)
        self._cancel(handover, reason)
        for index in sorted(attempt.open_choices)[:1]:
            other = self._handovers[attempt.engine_id, index]
            if other.first is not None and not other.peer:
                self._offer(other)

    def _cancel(self, handover: Handover, reason: str) -> None:
        """End a handoff that is under way; the rest goes when it has ended."""
        handover.cancelled = True
        if handover.key is not None and handover.key in self._by_key:
            handoff = self._node.links.handoff
            self._node.links.perform(handoff.cancel(handover.key, reason, now=time.monotonic()))
        elif handover.key is not None or not handover.peer:
            self._drop(handover)
        # else: `_open` is under way, and drops it

    def _drop(self, handover: Handover) -> None:
        attempt, choice = handover.attempt, handover.sequence.choice
        if self._handovers.pop((attempt.engine_id, choice), None) is None:
            return
        self._node.engine.pool.release(handover.held)
        handover.held = []
        if not any(id_ == attempt.engine_id for id_, _ in self._handovers):
            del self._attempts[attempt.engine_id]
            self._past.append(attempt.engine_id)
            assert attempt.entry is not None
            self._node.done(attempt.entry)
            self._node.wake()

    def received(self, effect: Adopted | Ended) -> None:
        """This role takes nothing."""

    def cancel(self, request: str, attempt: int, reason: str) -> None:
        for other in list(self._attempts.values()):
            if other.request == request and other.number <= attempt:
                self._abort(other, reason)

    def gateway_linked(self, gateway: str) -> None:
        for handover in self._handovers.values():
            if handover.attempt.gateway == gateway and not handover.cancelled:
                key = handover.attempt.key(handover.sequence.choice)
                self._node.stage(gateway, key, "prefilling", {})

    def gateway_lost(self, gateway: str) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.gateway == gateway:
                self._abort(attempt, "gateway lost")

    def _abort(self, attempt: Attempt, reason: str) -> None:
        self._node.engine.abort(attempt.engine_id)
        attempt.open_choices.clear()
        for (engine_id, _), handover in list(self._handovers.items()):
            if engine_id == attempt.engine_id:
                self._cancel(handover, reason)


def _for_prefill(dispatch: Dispatch) -> SamplingParams:
    """The same choice of the next token, with room for one more at most in this pool."""
    params = dispatch.params
    delivered = len(dispatch.token_ids) - dispatch.prompt_len
    most = min(params.max_tokens, delivered + 2)
    return dataclasses.replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def _ends_at_first(attempt: Attempt) -> bool:
    """Whether the first token is the last by its parameters; then nobody needs the KV."""
    dispatch = _dispatch(attempt)
    return len(dispatch.token_ids) + 1 >= dispatch.prompt_len + dispatch.params.max_tokens


def _dispatch(attempt: Attempt) -> Dispatch:
    assert attempt.entry is not None
    return attempt.entry.dispatch
