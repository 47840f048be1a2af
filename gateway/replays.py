"""Computes dead letters once more that a person has put back into the queue.

Owns: taking them from Redis, one at a time, and acting as their client. Each is an ordinary request under
the new id that `pdq queue requeue` gave it, but it is suspected from the start, so nodes compute it in
steps of its own. Its record shows the outcome. Its tokens are counted and not kept.
"""

from __future__ import annotations

import asyncio
import dataclasses

from common.errors import Overloaded, PdqError, ServiceUnavailable
from common.logs import get_logger
from common.store.requests import Requests
from common.wire.messages import Dispatch
from gateway.dispatch import Dispatcher
from gateway.open_request import Work

log = get_logger("replays")

LOOK_S = 1.0


class Replays:
    """Call `run`. Of several gateways, whichever looks first takes the next letter."""

    def __init__(self, requests: Requests, dispatcher: Dispatcher) -> None:
        self._requests = requests
        self._dispatcher = dispatcher

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                dispatch = await self._requests.take_requeued()
            except ServiceUnavailable:
                dispatch = None
            if dispatch is None:
                await asyncio.sleep(LOOK_S)
            else:
                await self._replay(dispatch)

    async def _replay(self, dispatch: Dispatch) -> None:
        prompt = dispatch.request.token_ids[: dispatch.request.prompt_len]
        asked = dataclasses.replace(dispatch.request, token_ids=prompt)
        work = Work(asked, n=max(dispatch.choices) + 1, suspected=True, node=dispatch.node)
        while True:
            try:
                async with self._dispatcher.run(work) as request:
                    async for _ in request.updates():
                        pass
            except Overloaded:
                await asyncio.sleep(LOOK_S)
                continue
            except PdqError as error:
                log.warning("replay.failed", request=work.request.id, error=error)
            else:
                log.info("replay.finished", request=work.request.id)
            return
