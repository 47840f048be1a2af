"""Who holds the choices of which no node has said anything yet.

Owns: the question, and what follows from the answer. A queue entry moves between nodes without
their telling the gateway: an idle node takes it over, one that leaves gives it back. Redis always
knows; so whenever a node is lost, and at every look for choices that wait for longer than a moment,
their records are read, in one round trip. Then each has a holder that lives, or is retried:

    queued at a node that lives      that node holds it; looked after again
    claimed by a node that lives     as if that node had said so: holders.py asks it from now on
    queued at, claimed by a dead one retried; who pulls it meanwhile finds it superseded
    returned, nowhere                retried
    unknown                          Redis forgot it: accepted there again

Knows nothing of tokens: a choice that a node has spoken of is followed by what nodes say.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping

from common.errors import ServiceUnavailable
from common.logs import get_logger
from common.store.requests import Place, Where
from gateway.open_request import Choice, OpenRequest
from gateway.ports import NodeDirectory, RequestStore

log = get_logger("whereabouts")

UNHEARD_S = 1.0  # an entry that waits for longer is looked after
ABSENT_S = 3.0  # a node of which there has been neither record nor link for so long is gone

CLAIM_LOST = "claim_lost"  # it had been read by the node that is gone

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
    ) -> None:
        self._open = open_requests
        self._store = store
        self._directory = directory
        self._retry = retry
        self._adopt = adopt
        self._absent: dict[str, float] = {}  # incarnation → since when nothing is known of it
        self._again = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Start a look, or have the one under way followed by another."""
        self._again.set()
        if self._looking is None and self._wanted():
            self._looking = asyncio.create_task(self._look(), name="whereabouts")
            self._looking.add_done_callback(self._looked)

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a bug: to the event loop's handler

    async def _look(self) -> None:
        while self._again.is_set():
            self._again.clear()
            wanted = self._wanted()
            if not wanted:
                return
            asked = [(one.request.id, one.attempt, one.index) for one in wanted]
            try:
                found = await self._store.locate(asked)
            except ServiceUnavailable as error:
                log.warning("whereabouts.unknown", choices=len(wanted), error=error)
                found = [Where(Place.QUEUED, one.choice.holder) for one in wanted]  # as believed
            for one, where in zip(wanted, found, strict=True):
                if self._is_unheard(one):
                    await self._conclude(one, where)

    def _wanted(self) -> list[_Unheard]:
        now = time.monotonic()
        return [
            one
            for request in self._open.values()
            for index, choice in enumerate(request.choices)
            if self._is_unheard(one := _Unheard(request, index, choice.stream.attempt))
            and (now - choice.placed_at >= UNHEARD_S or self._directory.lost(choice.holder))
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
        """Lost; or one that we never linked with, of which there has been no record for a while."""
        if self._directory.lost(node):
            return True
        if self._directory.known(node):
            self._absent.pop(node, None)
            return False
        now = time.monotonic()
        return now - self._absent.setdefault(node, now) >= ABSENT_S
