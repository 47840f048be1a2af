"""Finds out from Redis who holds the choices that no node has spoken of yet.

Owns: the lookup, and what follows from it. Queue entries move between nodes without a word to the
gateway: an idle node takes one over, a node that leaves gives one back. Redis always knows. So the
records of such choices are read, in one round trip, whenever a node is lost and whenever a choice has
waited for more than a moment. Then each choice has a live holder, or is retried:

    queued at a live node            that node holds it; it is looked up again
    claimed by a live node           as if that node had said so: holders.py asks it from now on
    queued at, claimed by a dead one retried; whoever pulls the entry meanwhile finds it superseded
    returned, nowhere                retried
    unknown                          Redis forgot it: it is accepted there again

Knows nothing of tokens: once a node has spoken of a choice, its messages say where it is (listener.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping

from common.background import report
from common.errors import ServiceUnavailable
from common.logs import get_logger
from common.store.requests import Place, Where
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeDirectory, RequestStore

log = get_logger("whereabouts")

ABSENT_S = 3.0  # a node that has had neither record nor link for so long is gone

CLAIM_LOST = "claim_lost"  # the node that is gone had claimed it

Retry = Callable[[OpenRequest, int, str, str], None]
"""Request, choice, cause, incarnation to avoid."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Unheard:
    """One choice in one attempt."""

    request: OpenRequest
    index: int
    attempt: int

    @property
    def choice(self) -> Choice:
        return self.request.choices[self.index]


class Whereabouts:
    """Call `look` at intervals, and at every loss of a node."""

    def __init__(
        self,
        open_requests: Mapping[str, OpenRequest],
        store: RequestStore,
        directory: NodeDirectory,
        retry: Retry,
        adopt: Callable[[OpenRequest, int, str, bool], None],
        unheard_s: float,
    ) -> None:
        self._open = open_requests
        self._store = store
        self._directory = directory
        self._retry = retry
        self._adopt = adopt
        self._unheard_s = unheard_s
        self._absent: dict[str, float] = {}  # incarnation → since when nothing is known of it
        self._again = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Start a lookup, or have another one follow the one that runs."""
        self._again.set()
        if self._looking is None and self._overdue():
            self._looking = asyncio.create_task(self._look_up(), name="whereabouts")
            self._looking.add_done_callback(self._looked)
            self._looking.add_done_callback(report)

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None

    async def _look_up(self) -> None:
        while self._again.is_set():
            self._again.clear()
            overdue = self._overdue()
            if not overdue:
                return
            asked = [(one.request.id, one.attempt, one.index) for one in overdue]
            try:
                found = await self._store.locate(asked)
            except ServiceUnavailable as error:
                log.warning("whereabouts.unknown", choices=len(overdue), error=error)
                found = [Where(Place.QUEUED, one.choice.holder) for one in overdue]  # as believed
            for one, where in zip(overdue, found, strict=True):
                if self._is_unheard(one):
                    await self._conclude(one, where)

    def _overdue(self) -> list[_Unheard]:
        now = time.monotonic()
        return [
            one
            for request in self._open.values()
            for index, choice in enumerate(request.choices)
            if self._is_unheard(one := _Unheard(request, index, choice.stream.attempt))
            and (now - choice.placed_at >= self._unheard_s or self._directory.lost(choice.holder))
        ]

    def _is_unheard(self, one: _Unheard) -> bool:
        choice = one.choice
        return (
            choice.stream.attempt == one.attempt
            and choice.placed_at > 0.0
            and not (choice.heard or choice.done)
            and one.request.id in self._open
        )

    async def _conclude(self, one: _Unheard, where: Where) -> None:
        choice, node = one.choice, where.node
        if where.place is Place.UNKNOWN:
            try:
                await self._store.accept(*one.request.dispatches[one.attempt])
            except ServiceUnavailable as error:
                log.warning("whereabouts.not_accepted", error=error)  # with the next look
        elif not node:
            self._lost(one, "given_back" if where.place is Place.RETURNED else "entry_lost", "")
        elif self._is_gone(node):
            self._lost(one, CLAIM_LOST if where.place is Place.CLAIMED else "node_lost", node)
        elif where.place is Place.CLAIMED or node != choice.holder:
            log.info("choice.found", request=one.request.id, choice=one.index, node=node, place=where.place)
            self._adopt(one.request, one.index, node, where.place is Place.CLAIMED)

    def _lost(self, one: _Unheard, cause: str, node: str) -> None:
        log.info("choice.lost", request=one.request.id, choice=one.index, node=node, reason=cause)
        self._retry(one.request, one.index, cause, node)

    def _is_gone(self, node: str) -> bool:
        """Whether a node is lost, or has had neither a link nor a record for a while."""
        if self._directory.lost(node):
            return True
        if self._directory.known(node):
            self._absent.pop(node, None)
            return False
        now = time.monotonic()
        return now - self._absent.setdefault(node, now) >= ABSENT_S
