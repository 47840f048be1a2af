"""Where an attempt goes, and the message that the node reads.

Owns: the wait for a node that can take the attempt, its Dispatch, and the count of prompt tokens that
were sent to nodes since their loads were read. Knows nothing of retries or of the attempt's outcome.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence

from common.errors import PdqError, ServiceUnavailable
from common.identity import ModelIdentity
from common.logs import get_logger
from common.request import Request
from common.sampling import SamplingParams
from common.wire.messages import Dispatch
from gateway.metrics import GatewayMetrics
from gateway.open_request import OpenRequest
from gateway.ports import NodeBus, NodeDirectory, NodeView
from gateway.router import Decision, RouteQuestion, Router, what_lacks

log = get_logger("placement")


@dataclasses.dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How long and how often the dispatcher tries."""

    max_attempts: int = 4
    max_open: int = 256
    placement_timeout_s: float = 8.0  # without any node to go to
    request_timeout_s: float = 600.0
    unheard_s: float = 1.0  # an entry that has waited for longer is looked up
    quiet_s: float = 5.0  # without a message about a choice: then its holders are asked
    audit_interval_s: float = 10.0  # between two looks for requests that only Redis takes for open
    max_ends: int = 0  # that Redis has not heard of; 0: eight for each request that may be open


class Placement:
    """All methods run on one event loop."""

    def __init__(
        self,
        gateway: str,
        bus: NodeBus,
        directory: NodeDirectory,
        router: Router,
        limits: DispatchLimits,
        metrics: GatewayMetrics,
    ) -> None:
        self._gateway = gateway
        self._bus = bus
        self._directory = directory
        self._router = router
        self._limits = limits
        self._metrics = metrics
        # Prompt tokens by node: sent, less those computed, since loads were read; may be negative.
        self._in_flight: Counter[str] = Counter()
        self._nodes_changed = asyncio.Event()

    def ready(self, model: ModelIdentity) -> str | None:
        """None when a request for this model could be placed now, else what is missing."""
        probe = RouteQuestion(Request("ready", model, (0,), 1, SamplingParams(max_tokens=1)))
        try:
            decision = self._router.route(probe, self._directory.nodes(), {})
        except PdqError as error:
            return error.message
        return None if decision else what_lacks(model, self._directory.nodes())

    # Finding a place.

    async def find(
        self,
        request: OpenRequest,
        choices: tuple[int, ...],
        attempt: int,
        token_ids: tuple[int, ...],
        *,
        avoid: frozenset[str],
        alone: bool,
    ) -> tuple[str, Dispatch]:
        """Choose a node for the attempt and make its Dispatch; the request notes both. Raises
        `ServiceUnavailable` if no node comes in time, and what the router raises."""
        work = request.work
        asked = dataclasses.replace(
            work.request, token_ids=token_ids, gateway=self._gateway, gateway_endpoint=self._bus.endpoint
        )
        question = RouteQuestion(asked, fingerprint=request.fingerprint, avoid=avoid, only=work.node)
        decision = await self._decide(question)
        node = decision.prefill.incarnation
        log.debug("request.placed", request=asked.id, node=node, why=decision.reason)
        request.fingerprint = request.fingerprint or decision.prefill.fingerprint
        self._metrics.placements.labels(decision.prefill.role).inc()
        request.involved.add(node)
        dispatch = Dispatch(
            request=asked,
            attempt=attempt,
            choices=choices,
            decode_node=decision.decode.incarnation if decision.decode else "",
            decode_endpoint=decision.decode.endpoint if decision.decode else "",
            alone=alone,
            node=work.node,
        )
        request.dispatches[attempt] = (node, dispatch)
        self._in_flight[node] += len(token_ids)
        request.uncomputed[attempt] = (node, len(token_ids))
        return node, dispatch

    def moved(self, request: OpenRequest, attempt: int, node: str) -> None:
        """Note that the attempt's queue entry lies at this node now."""
        request.involved.add(node)
        _, dispatch = request.dispatches[attempt]
        request.dispatches[attempt] = (node, dispatch)
        counted = request.uncomputed.get(attempt)
        if counted is not None:
            before, prompt_tokens = counted
            self._in_flight[before] -= prompt_tokens
            self._in_flight[node] += prompt_tokens
            request.uncomputed[attempt] = (node, prompt_tokens)

    def computed(self, request: OpenRequest, attempt: int) -> None:
        """Note that the attempt's prompt is computed, since a token has arrived."""
        counted = request.uncomputed.pop(attempt, None)
        if counted is not None:
            node, prompt_tokens = counted
            self._in_flight[node] -= prompt_tokens

    def loads_read(self) -> None:
        """Forget what was on its way: the nodes' loads were just read, and include it."""
        self._in_flight.clear()
        self._nodes_changed.set()

    def nodes_changed(self) -> None:
        """Have whoever waits for a node look again."""
        self._nodes_changed.set()

    async def _decide(self, question: RouteQuestion) -> Decision:
        """Ask the router, and wait for a node to come if there is none, up to the limit."""
        try:
            async with asyncio.timeout(self._limits.placement_timeout_s):
                while True:
                    self._nodes_changed.clear()
                    await question.hash_for(self._directory.nodes())
                    nodes = self._directory.nodes()
                    decision = self._router.route(question, nodes, self._in_flight)
                    if decision is not None:
                        return decision
                    await self._nodes_changed.wait()
        except TimeoutError as error:
            nodes = self._directory.nodes()
            lacks = self.ready(question.request.model)
            if question.only and not any(node.incarnation == question.only for node in nodes):
                lacks = f"{question.only}, which it is for, is not there"
            here = "; ".join(filter(None, (_roles(nodes), lacks)))
            raise ServiceUnavailable(
                f"no node could take the request within {self._limits.placement_timeout_s:g} s: {here}"
            ) from error


def _roles(views: Sequence[NodeView]) -> str:
    if not views:
        return "no node is registered"
    counts = Counter(
        f"{view.role}{'' if view.healthy else ', unhealthy'}{', draining' if view.draining else ''}"
        for view in views
    )
    return "; ".join(f"{count} {role}" for role, count in sorted(counts.items()))
