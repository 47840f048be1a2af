"""What nodes say of choices, and what follows at once.

Owns: the delivery of tokens and their acknowledgement, and which node holds a choice, as nodes tell it.
A node that computes what nobody wants any more is told to stop. Knows nothing of retries: a choice that
failed or lost its holder is passed on (dispatch.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from common.errors import NotHeld, ProtocolError
from common.logs import get_logger
from common.wire.message import Message
from common.wire.messages import Cancel, Failed, Stage, TokenRun, Tokens, TokensAck, TookOver
from gateway.ledger import Ledger
from gateway.metrics import GatewayMetrics
from gateway.open_request import Choice, OpenRequest, Update
from gateway.placement import Placement
from gateway.ports import NodeBus, NodeDirectory
from gateway.speakers import Speakers

log = get_logger("dispatch")


class Listener:
    """All methods run on one event loop."""

    def __init__(
        self,
        gateway: str,
        open_requests: Mapping[str, OpenRequest],
        bus: NodeBus,
        directory: NodeDirectory,
        placement: Placement,
        speakers: Speakers,
        ledger: Ledger,
        metrics: GatewayMetrics,
        *,
        failed: Callable[[OpenRequest, Failed], None],
        lost: Callable[[str, str], None],
    ) -> None:
        """`failed` hears of an attempt that failed at a node which was expected to compute it, `lost`
        of a node that said something and was gone before."""
        self._gateway = gateway
        self._open = open_requests
        self._bus = bus
        self._directory = directory
        self._placement = placement
        self._speakers = speakers
        self._ledger = ledger
        self._metrics = metrics
        self._failed = failed
        self._lost = lost

    def on_message(self, node: str, message: Message) -> None:
        match message:
            case Tokens():
                self._on_tokens(node, message)
            case TookOver():
                self._on_took_over(node, message)
            case Stage():
                self._on_stage(message)
            case Failed():
                self._on_failed(message)

    def stop(self, request: OpenRequest, index: int) -> None:
        """Have every node that may have something of this choice free it."""
        for node in request.involved:
            self._stop_choice(node, request, index)

    # ── Tokens ───────────────────────────────────────────────────────────────────────────────────

    def _on_tokens(self, node: str, message: Tokens) -> None:
        acks = []
        for run in message.runs:
            below = self._take(node, run)
            if below is not None:
                acks.append((run.request, run.attempt, run.choice, below))
        if acks:
            self._bus.send(node, TokensAck(self._gateway, tuple(acks)))

    def _take(self, node: str, run: TokenRun) -> int | None:
        """Deliver what is new in a run. Returns the position below which to acknowledge: the end of a run
        that nobody will take, so that the node does not keep it; None while that is open."""
        request = self._open.get(run.request)
        if request is None or not 0 <= run.choice < len(request.choices):
            if not run.finish_reason:
                self._stop_unknown(node, run.request, run.attempt)
            return run.end
        choice = request.choices[run.choice]
        if not self._speakers.heeds(node, request, choice, run.attempt):
            self._speakers.refuse(Tokens(node, (run,)), node, request, choice, run.attempt)
            if run.attempt >= choice.stream.attempt:
                return None
            self._stop_old(node, request, run.attempt)
            return run.end
        is_current = run.attempt == choice.stream.attempt
        if is_current and not choice.heard:
            self._hold(choice, node)
        try:
            arrival = choice.stream.accept(run)
        except ProtocolError as error:
            self._metrics.refused_runs.inc()
            log.warning("run.refused", node=node, error=error)
            return run.end
        below = choice.stream.acknowledged(run)
        if is_current:
            choice.stirred_at = time.monotonic()
            self._acknowledge_others(node, choice, run)
        else:
            self._stop_old(node, request, run.attempt)
        self._metrics.duplicate_tokens.inc(arrival.duplicates)
        if arrival.mismatched:
            self._metrics.mismatched_tokens.inc(arrival.mismatched)
            log.error(
                "run.mismatched",
                node=node,
                request=run.request,
                attempt=run.attempt,
                choice=run.choice,
                positions=arrival.mismatched,
            )
        if choice.done:
            self._stop_choice(node, request, run.choice)
        elif arrival.delivered or arrival.finished:
            self._observe(request, choice, len(arrival.delivered))
            choice.done = arrival.finished is not None
            request.publish(Update(run.choice, arrival.delivered, arrival.finished))
        return below

    def _acknowledge_others(self, node: str, choice: Choice, run: TokenRun) -> None:
        """Acknowledge to other nodes what this run delivers by filling a gap. A decode node's tokens may
        arrive before the first one, and the node may have none left to send."""
        below = choice.stream.below
        if run.end > below:
            choice.unacknowledged[node] = max(run.end, choice.unacknowledged.get(node, 0))
        else:
            choice.unacknowledged.pop(node, None)
        for other, wanted in list(choice.unacknowledged.items()):
            if other != node and below >= wanted:
                del choice.unacknowledged[other]
                ack = (run.request, run.attempt, run.choice, below)
                self._bus.send(other, TokensAck(self._gateway, (ack,)))

    def _observe(self, request: OpenRequest, choice: Choice, tokens: int) -> None:
        now = time.monotonic()
        self._placement.computed(request, choice.stream.attempt)
        if not choice.last_arrival:
            self._metrics.ttft.observe(now - request.accepted_at)
        else:
            self._metrics.itl.observe(now - choice.last_arrival)
        choice.last_arrival = now
        self._metrics.tokens.inc(tokens)

    # ── Holders and stages ───────────────────────────────────────────────────────────────────────

    def _on_took_over(self, node: str, message: TookOver) -> None:
        request, choice = self._find("TookOver", message)
        if request is None or choice is None:
            self._stop_unknown(message.node, message.request, message.attempt)
            return
        if not self._speakers.heeds_taking_over(node, message.node, request, choice, message.attempt):
            self._speakers.refuse(message, node, request, choice, message.attempt)
            return
        request.involved.add(message.node)
        if choice.done:
            self._stop_choice(message.node, request, message.choice)
        if message.attempt == choice.stream.attempt:
            if choice.heard and choice.holder == message.node:
                return  # both ends of a handoff say it
            if message.position < choice.held_from:
                if message.node != choice.holder:  # it owes the tokens before the next holder's
                    choice.owing.setdefault(message.node, choice.held_from)
                    self._hear_again(choice)
                return  # late: the choice has moved on since
            if choice.held_from and choice.holder:
                self._metrics.moves.inc()
            if choice.holder:
                choice.owing[choice.holder] = message.position
            choice.held_from = message.position
            stage = Stage(message.node, message.request, message.attempt, message.choice, "decoding", {}, 0)
            self._ledger.stage(stage)
            self._hold(choice, message.node)
            self._hear_again(choice)
        else:
            self._stop_old(message.node, request, message.attempt)

    def _on_stage(self, message: Stage) -> None:
        request, choice = self._find("Stage", message)
        if request is None or choice is None:
            if message.state == "prefilling":  # it begins; later stages may come after a good end
                self._stop_unknown(message.node, message.request, message.attempt)
            return
        if not self._speakers.heeds(message.node, request, choice, message.attempt):
            self._speakers.refuse(message, message.node, request, choice, message.attempt)
            return
        request.involved.add(message.node)
        if message.attempt < choice.stream.attempt:
            self._stop_old(message.node, request, message.attempt)
        elif message.attempt == choice.stream.attempt and not choice.heard:
            # An entry that nobody had read may have moved to another node.
            self._hold(choice, message.node)
        if message.cached_tokens > request.cached_tokens:
            self._metrics.cached_tokens.inc(message.cached_tokens - request.cached_tokens)
            request.cached_tokens = min(message.cached_tokens, len(request.work.request.token_ids))
        self._ledger.stage(message)

    def _on_failed(self, message: Failed) -> None:
        request, choice = self._find("Failed", message)
        if request is None or choice is None:
            return
        if message.attempt != choice.stream.attempt or choice.done or not choice.holder:
            return  # an attempt that was given up before, or its second message
        if not self._speakers.heeds(message.node, request, choice, message.attempt):
            self._speakers.refuse(message, message.node, request, choice, message.attempt)
            return
        expected = (choice.holder, *choice.owes())
        if (choice.heard or message.code == NotHeld.code) and message.node not in expected:
            return  # nothing is expected from it any more
        self._failed(request, message)

    def _hold(self, choice: Choice, node: str) -> None:
        """Make `node` the holder. Its message may have arrived after the news of its death."""
        choice.holder, choice.heard, choice.stirred_at = node, True, time.monotonic()
        if self._directory.lost(node):
            self._lost(node, "gone before what it said arrived")

    def _hear_again(self, choice: Choice) -> None:
        """Handle the messages that came too early: one may be of the new holder."""
        early, choice.early = choice.early, []
        for node, message in early:
            self.on_message(node, message)

    def _find(
        self, kind: str, message: TookOver | Stage | Failed
    ) -> tuple[OpenRequest | None, Choice | None]:
        request = self._open.get(message.request)
        if request is None or not 0 <= message.choice < len(request.choices):
            self._metrics.late_messages.labels(kind).inc()
            return None, None
        return request, request.choices[message.choice]

    # ── Stopping ─────────────────────────────────────────────────────────────────────────────────

    def _stop_unknown(self, node: str, request: str, attempt: int) -> None:
        if request not in self._open:
            self._metrics.late_messages.labels("Tokens").inc()
            self._bus.send(node, Cancel(self._gateway, request, attempt, "closed"))

    def _stop_old(self, node: str, request: OpenRequest, attempt: int) -> None:
        """Stop attempts up to `attempt` at `node`, unless a live choice runs in one of them."""
        alive = any(c.stream.attempt <= attempt and not c.done for c in request.choices)
        if not alive:
            self._bus.send(node, Cancel(self._gateway, request.id, attempt, "superseded"))

    def _stop_choice(self, node: str, request: OpenRequest, index: int) -> None:
        """Have a node free a choice that was stopped, unless the whole request ends anyway."""
        stream = request.choices[index].stream
        if not stream.finished and not request.done:
            name, attempt = request.id, stream.attempt
            self._bus.send(node, Cancel(self._gateway, name, attempt, "stopped", (index,)))
