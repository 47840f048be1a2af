"""`RequestStore` over Redis: what the dispatcher says, in the words of common/store/requests.py."""

from __future__ import annotations

from collections.abc import Sequence

from common.logs import get_logger
from common.store.requests import Requests, State, Where
from common.wire.messages import Dispatch, Stage
from gateway.ports import Ending

log = get_logger("records")


class RecordStore:
    """Implements `ports.RequestStore`."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def accept(self, node: str, dispatch: Dispatch, *, claimed_by: str = "") -> None:
        await self._requests.accept(dispatch, node, claimed_by=claimed_by)

    async def locate(self, choices: Sequence[tuple[str, int, int]]) -> Sequence[Where]:
        return await self._requests.locate(choices)

    async def advance(self, stage: Stage) -> None:
        try:
            state = State(stage.state)
        except ValueError:
            log.warning("stage.unknown", node=stage.node, state=stage.state)
            return
        if state.terminal:
            return  # how a request ends is for its gateway to say
        await self._requests.advance(
            stage.request,
            stage.attempt,
            (stage.choice,),
            state,
            node=stage.node,
            seconds=stage.durations,
            cached_tokens=stage.cached_tokens,
        )

    async def finish(self, request: str, endings: Sequence[Ending]) -> None:
        for ending in endings:
            await self._requests.finish(
                request,
                ending.attempt,
                (ending.choice,),
                finish_reason=ending.finish_reason,
                generated=ending.generated,
            )

    async def bury(self, dispatch: Dispatch, reason: str) -> None:
        await self._requests.dead_letter(dispatch, reason)

    async def open_requests(self, gateway: str) -> set[str]:
        return await self._requests.open_requests(gateway)

    async def end(self, request: str, state: str, code: str, message: str) -> None:
        if state == State.CANCELLED:
            await self._requests.cancel(request, message)
        else:
            await self._requests.fail(request, code, message)
