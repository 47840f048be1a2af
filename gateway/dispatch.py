"""The open requests of this gateway: accepted, followed, retried, cancelled, closed.

Owns: every request between acceptance and its end, which incarnation holds which choice, the
attempt numbers, and the only retries of the whole system. Knows nothing of HTTP or text.

How a choice moves (a request's choices start together in attempt 1, a retry is for one choice):

    placed at a node ──Tokens──▶ … ──▶ finished
       │  ▲   TookOver: now another node holds it, from a position on
       ▼  │
    holder lost, a former one that owes tokens lost, or Failed(retryable), which a node also answers
    when it has nothing of what it is asked for (holders.py); while no node has spoken of it, what
    Redis says (whereabouts.py)
       │  ▲
       ▼  │
    new attempt: prompt + delivered tokens, same border
       │
       ▼
    tries used up, nowhere to go in time, or Failed(not retryable) ──▶ the request fails

Attempt numbers count over the whole request. An old attempt that was thought dead may still run
somewhere: what it sends is acknowledged and dropped, and it is told to stop as soon as that cannot
stop a choice that is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Coroutine, Sequence

from common.errors import (
    EngineBroken,
    NotHeld,
    Overloaded,
    PdqError,
    PoisonedRequest,
    RequestAborted,
    ServiceUnavailable,
    from_code,
)
from common.identity import ModelIdentity
from common.logs import get_logger
from common.wire.bus_links import Down
from common.wire.message import Message
from common.wire.messages import Cancel, Failed, TokensAck
from gateway.holders import Holders
from gateway.ledger import Ledger
from gateway.listener import Listener
from gateway.metrics import GatewayMetrics
from gateway.open_request import OpenRequest, Work
from gateway.placement import DispatchLimits, Placement
from gateway.ports import Ending, NodeBus, NodeDirectory, RequestStore
from gateway.router import Router, longest_context, longest_request
from gateway.speakers import Speakers
from gateway.suspicion import Suspicion, Verdict
from gateway.whereabouts import CLAIM_LOST, Whereabouts

log = get_logger("dispatch")

NO_FAULT = frozenset({NotHeld.code, "given_back"})  # no fault of the request: they cost no try
NO_ROOM = frozenset({"out_of_blocks", "overloaded"})  # nobody failed: they cost time, not a try
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # before a request that found no room asks again
# Ends of a node that a request may have caused. A node that is only silent may have been stopped or cut
# off: its requests are suspected, but none is found guilty by it.
CRASHES = frozenset({Down.DISCONNECTED, Down.UNREACHABLE, Down.STALLED, "unconnectable"})
STOPS = frozenset({Down.SILENT})
STORE_RETRY_S = 0.2  # between two tries to reach Redis for a retry
LAST_WRITES_S = 5.0  # for which a gateway waits for Redis when it ends


class Dispatcher:
    """Implements `ports.Inbox`. All methods run on one event loop."""

    def __init__(
        self,
        *,
        gateway: str,
        store: RequestStore,
        bus: NodeBus,
        directory: NodeDirectory,
        router: Router,
        limits: DispatchLimits,
        metrics: GatewayMetrics,
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._bus = bus
        self._directory = directory
        self._limits = limits
        self._metrics = metrics
        self._open: dict[str, OpenRequest] = {}
        self._placement = Placement(gateway, bus, directory, router, limits, metrics)
        self._holders = Holders(gateway, self._open, bus, directory, self.on_node_lost, limits.quiet_s)
        self._whereabouts = Whereabouts(
            self._open, store, directory, self._lose_unheard, self._adopt, limits.unheard_s
        )
        self._speakers = Speakers(directory, metrics)
        self._suspicion = Suspicion()
        self._ledger = Ledger(
            gateway,
            self._open,
            store,
            metrics,
            max_ends=limits.max_ends or 8 * limits.max_open,
            audit_interval_s=limits.audit_interval_s,
        )
        self._listener = Listener(
            gateway,
            self._open,
            bus,
            directory,
            self._placement,
            self._speakers,
            self._ledger,
            metrics,
            failed=self._failed,
            lost=self.on_node_lost,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    # ── For the HTTP side ────────────────────────────────────────────────────────────────────────

    @property
    def num_open(self) -> int:
        return len(self._open)

    def longest_request(self, model: ModelIdentity) -> int | None:
        """Prompt plus output that some node could hold, None while there is none."""
        return longest_request(model, self._directory.nodes())

    def longest_context(self, model: ModelIdentity) -> int | None:
        """The longest context of its nodes, which settings may make shorter than the model's."""
        return longest_context(model, self._directory.nodes())

    def ready(self, model: ModelIdentity) -> str | None:
        """None when a request for this model could be placed now, else what is missing."""
        return self._placement.ready(model)

    @property
    def max_open(self) -> int:
        """Requests that may be open at one time, so the most that one client's list may become."""
        return self._limits.max_open

    def check_room(self, count: int) -> None:
        """Raises `Overloaded` unless so many more requests may be opened now."""
        if len(self._open) + count > self._limits.max_open:
            raise Overloaded(
                f"{len(self._open)} requests are open of {self._limits.max_open} at most, "
                f"{count} more were asked for"
            )

    @contextlib.asynccontextmanager
    async def run(self, work: Work) -> AsyncIterator[OpenRequest]:
        """Accept the request, give it to the caller, and leave nothing of it behind after.

        Leaving early (an error, a cancel, a client that went) cancels it on every node.
        """
        self.check_room(1)
        self._ledger.check_room()
        request = OpenRequest(work)
        request.accepted_at = time.monotonic()
        self._open[work.request.id] = request
        if work.suspected:
            self._suspicion.suspect(work.request.id)
        self._metrics.open_requests.inc()
        limit = self._limits.request_timeout_s
        overdue = asyncio.get_running_loop().call_later(
            limit, request.fail, RequestAborted(f"the request took longer than {limit:g} s")
        )
        state, reason, message = "cancelled", "request_aborted", "client went away"
        try:
            everything = tuple(range(work.n))
            await self._place(request, everything, 1, work.request.token_ids, frozenset())
            self._metrics.prompt_tokens.inc(len(work.request.token_ids))
            yield request
            if request.done:
                state = "finished"
        except PdqError as error:
            state, reason, message = "failed", error.code, error.message
            raise
        finally:
            overdue.cancel()
            self._close(request, state, reason, message)

    def stop(self, request: OpenRequest, index: int) -> None:
        """End one choice, whose stop string was met: every node frees it, while its siblings go on."""
        request.stop(index)
        self._listener.stop(request, index)

    def fail_all(self, error: PdqError) -> None:
        """End every open request with `error`, as its client will be told."""
        for request in tuple(self._open.values()):
            request.fail(error)

    async def shut_down(self) -> None:
        """Wait for the writes that close requests; give up retries that still look for a node."""
        self._whereabouts.close()
        for task in tuple(self._tasks):
            if task.get_name() == "retry":
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._ledger.settle(LAST_WRITES_S)

    async def reassert(self) -> None:
        """Write all open requests again, each where it was, after Redis has lost its content."""
        for request in tuple(self._open.values()):
            for choice in request.choices:
                sent = request.dispatches.get(choice.stream.attempt)
                if sent is not None and choice.holder and not choice.done:
                    claimed_by = choice.holder if choice.heard else ""
                    await self._store.accept(*sent, claimed_by=claimed_by)

    # ── Placing ──────────────────────────────────────────────────────────────────────────────────

    async def _place(
        self,
        request: OpenRequest,
        choices: tuple[int, ...],
        attempt: int,
        token_ids: tuple[int, ...],
        avoid: frozenset[str],
    ) -> None:
        """Find a node and write the attempt into its queue.

        The node counts as the holder from before the write, so that its death meanwhile causes a retry
        too.
        """
        node, dispatch = await self._placement.find(
            request, choices, attempt, token_ids, avoid=avoid, alone=request.id in self._suspicion
        )
        for choice in choices:
            request.choices[choice].holder = node
        await self._store.accept(node, dispatch)
        for choice in choices:
            if request.choices[choice].stream.attempt == attempt:
                request.choices[choice].placed_at = time.monotonic()
        if self._directory.lost(node):
            self._whereabouts.look()

    # ── Retrying ─────────────────────────────────────────────────────────────────────────────────

    def _retry(self, request: OpenRequest, index: int, cause: str, avoid: str) -> None:
        """Start the next attempt of one choice; `avoid` is the incarnation that failed it."""
        choice = request.choices[index]
        if choice.tries >= self._limits.max_attempts and cause not in NO_ROOM | NO_FAULT:
            request.fail(ServiceUnavailable(f"given up after {choice.tries} attempts, the last: {cause}"))
            return
        pause = 0.0
        if cause in NO_ROOM:
            pause = min(FIRST_PAUSE_S * 2**choice.refusals, LONGEST_PAUSE_S)
            choice.refusals = min(choice.refusals + 1, 10)
        elif cause not in NO_FAULT:
            choice.tries += 1
        choice.holder, choice.heard, choice.held_from, choice.placed_at = "", False, 0, 0.0
        choice.owing.clear()
        waited, old = dict(choice.unacknowledged), choice.stream.attempt
        choice.unacknowledged.clear()
        self._speakers.unexplained(request, choice)
        request.attempt += 1
        choice.stream.begin(request.attempt)
        for other, below in waited.items():  # behind what is lost now
            self._bus.send(other, TokensAck(self._gateway, ((request.id, old, index, below),)))
        for other in request.involved | request.refused:
            self._bus.send(other, Cancel(self._gateway, request.id, old, "superseded", (index,)))
        self._metrics.retries.labels(cause).inc()
        self._spawn(self._place_again(request, index, frozenset({avoid}), pause), "retry", [request])

    async def _place_again(
        self, request: OpenRequest, index: int, avoid: frozenset[str], pause: float
    ) -> None:
        await asyncio.sleep(pause)
        choice = request.choices[index]
        attempt = choice.stream.attempt
        token_ids = request.work.request.token_ids + choice.stream.token_ids
        deadline = time.monotonic() + self._limits.placement_timeout_s
        while request.id in self._open and choice.stream.attempt == attempt:
            try:
                await self._place(request, (index,), attempt, token_ids, avoid)
                if request.id not in self._open:
                    # Closed while the write was under way, which may have come after its end.
                    self._end(request, "cancelled", "request_aborted", "closed")
                return
            except ServiceUnavailable as error:
                # Redis is away: the request was accepted, so it outlives that, up to the limit.
                if time.monotonic() > deadline:
                    request.fail(error)
                    return
                await asyncio.sleep(STORE_RETRY_S)
            except PdqError as error:
                request.fail(error)
                return

    # ── News of nodes ────────────────────────────────────────────────────────────────────────────

    def on_message(self, node: str, message: Message) -> None:
        self._listener.on_message(node, message)

    def on_interval(self) -> None:
        self._holders.look()

    def on_nodes_changed(self) -> None:
        self._placement.loads_read()
        self._whereabouts.look()
        self._ledger.audit()

    def on_node_linked(self, node: str) -> None:
        self._holders.linked(node)
        self.on_nodes_changed()

    def on_node_lost(self, node: str, reason: str) -> None:
        """Retry every choice that this incarnation is known to hold, or to owe tokens of. Look up those that
        no node has spoken of yet."""
        lost: list[tuple[OpenRequest, int]] = []
        for request in tuple(self._open.values()):
            for index, choice in enumerate(request.choices):
                held = choice.heard and choice.holder == node
                if (held or node in choice.owes()) and not choice.done:
                    log.info("choice.lost", request=request.id, choice=index, node=node, reason=reason)
                    lost.append((request, index))
        if reason in CRASHES and any(one.id in self._suspicion for one, _ in lost):
            self._spawn(self._judge(node, lost), "judge", [request for request, _ in lost])
        else:
            for request, index in lost:
                self._lose(request, index, node, crashed=reason in CRASHES | STOPS)
        self._whereabouts.look()
        self._placement.nodes_changed()

    async def _judge(self, node: str, lost: list[tuple[OpenRequest, int]]) -> None:
        """Handle the crash of a node that had suspects: its record says whether one was alone in the step."""
        attempts = [request.choices[index].stream.attempt for request, index in lost]
        alone = await self._directory.alone(node)
        for (request, index), attempt in zip(lost, attempts, strict=True):
            choice = request.choices[index]
            if request.id in self._open and choice.stream.attempt == attempt:
                self._lose(request, index, node, crashed=True, alone=alone)

    def _lose(
        self, request: OpenRequest, index: int, node: str, *, crashed: bool, alone: str | None = None
    ) -> None:
        """Retry a choice that `node` took with it, or bury its request. `alone`: as in `Suspicion.judge`."""
        choice, name = request.choices[index], request.id
        if crashed and choice.heard and choice.holder == node:
            attempt = choice.stream.attempt
            _, dispatch = request.dispatches[attempt]
            start = len(dispatch.request.token_ids)
            verdict = self._suspicion.judge(
                name,
                attempt,
                alone,
                proved=start if start > dispatch.request.prompt_len else 0,
                came_on=choice.stream.below > max(choice.held_from, start),
            )
            if verdict is Verdict.GUILTY:
                error = PoisonedRequest(
                    "a node ended while it computed this request with nothing else beside it, "
                    "after another one had"
                )
                self._bury(request, choice.stream.attempt, node, error)
                choice.holder = ""
                request.fail(error)
                return
        self._retry(request, index, "node_lost", node)

    def _lose_unheard(self, request: OpenRequest, index: int, cause: str, node: str) -> None:
        """Retry a choice that no node has spoken of and that nobody holds any more. If `node` had claimed
        it, it may have been in that node's last step."""
        if cause == CLAIM_LOST:
            attempt = request.choices[index].stream.attempt
            self._suspicion.judge(request.id, attempt, None)
        self._retry(request, index, cause, node)

    def _failed(self, request: OpenRequest, message: Failed) -> None:
        if message.retryable:
            if message.code == EngineBroken.code:
                self._suspicion.suspect(message.request)
            self._retry(request, message.choice, message.code, message.node)
        else:
            error = from_code(message.code, message.message)
            if isinstance(error, PoisonedRequest):
                self._bury(request, message.attempt, message.node, error)
            request.fail(error)

    def _bury(self, request: OpenRequest, attempt: int, node: str, error: PoisonedRequest) -> None:
        """Keep what was asked of the node as a dead letter."""
        _, dispatch = request.dispatches[attempt]
        self._metrics.dead_letters.inc()
        log.error("request.poisoned", request=request.id, node=node, error=error)
        reason = f"{node}: {error.message}"
        self._ledger.letter(request.id, lambda: self._store.bury(dispatch, reason))

    def _adopt(self, request: OpenRequest, index: int, node: str, claimed: bool) -> None:
        """Note that `node` has the entry of this choice, of which it has said nothing yet."""
        choice = request.choices[index]
        attempt = choice.stream.attempt
        choice.holder, choice.heard, choice.stirred_at = node, claimed, time.monotonic()
        self._placement.moved(request, attempt, node)

    # ── Ending ───────────────────────────────────────────────────────────────────────────────────

    def _close(self, request: OpenRequest, state: str, reason: str, message: str) -> None:
        work = request.work
        del self._open[work.request.id]
        self._suspicion.forget(work.request.id)
        self._metrics.open_requests.dec()
        self._metrics.requests.labels(state).inc()
        told = set(request.refused)
        if not all(choice.stream.finished for choice in request.choices):
            told |= request.involved
        for node in told:
            self._bus.send(node, Cancel(self._gateway, work.request.id, request.attempt, reason))
        if request.dispatches:
            self._end(request, state, reason, message)
        for choice in request.choices:
            self._speakers.unexplained(request, choice)

    def _end(self, request: OpenRequest, state: str, code: str, message: str) -> None:
        """Have the end written to Redis, however long that takes."""
        name, store = request.id, self._store
        endings = [
            Ending(index, c.stream.attempt, c.stream.finished or "stop", len(c.stream.token_ids))
            for index, c in enumerate(request.choices)
        ]
        if state == "finished":
            self._ledger.end(name, lambda: store.finish(name, endings))
        else:
            self._ledger.end(name, lambda: store.end(name, state, code, message))

    # ── Background ───────────────────────────────────────────────────────────────────────────────

    def _spawn(
        self, coroutine: Coroutine[None, None, None], name: str, requests: Sequence[OpenRequest]
    ) -> None:
        """Do something for these requests, which end if it fails: nobody else would go on with them."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._background_ended, requests))

    def _background_ended(self, requests: Sequence[OpenRequest], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", task=task.get_name(), error=repr(error), exc_info=error)
            for request in requests:
                request.fail(PdqError("the gateway failed at it; its log says why"))
