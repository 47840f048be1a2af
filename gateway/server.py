"""The HTTP server: uvicorn with our connections, their deadlines, and a bound on all of them.

Owns: putting uvicorn together, the loop that ends what is overdue, and what happens when the system
gives no more descriptors. Knows nothing of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from common.background import is_a_failure, report
from common.errors import PdqError
from common.logs import get_logger
from common.settings.config import HTTPSettings
from gateway.connection import Connection, Roster

ACCEPTED_AT_ONCE = 64  # connections in one turn of the event loop
LISTEN_BACKLOG = 2048  # connections that the system keeps for us meanwhile
FAREWELL_S = 1.0  # for clients to take their last bytes

log = get_logger("http")


class Server(uvicorn.Server):
    """Serves `app` until `should_exit`. Leaves signals alone: whoever runs it has its own."""

    def __init__(self, app: ASGIApp, settings: HTTPSettings, grace_period_s: float = 0.0) -> None:
        self.roster = Roster(settings)
        self.failure: BaseException | None = None  # that ends the gateway
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, roster=self.roster),  # type: ignore[arg-type]
                lifespan="off",
                log_config=None,
                access_log=False,
                ws="none",
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=settings.keep_alive_timeout_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=math.ceil(grace_period_s + FAREWELL_S),
            )
        )
        self.config.load()  # imports modules, which may need files that nobody has when it serves

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self, error: PdqError) -> None:
        """Answer those whose request is not here yet with `error`, and cut off who is not done after
        `FAREWELL_S`, in which whoever makes the other answers ends them."""
        for connection in tuple(self.roster.waiting):
            connection.refuse(error)
        asyncio.get_running_loop().call_later(FAREWELL_S, self._cut_off)

    def _cut_off(self) -> None:
        late = [each for each in tuple(self.roster.open) if each.owes_an_answer]
        if late:
            log.warning("gateway.cut_off", connections=len(late))
        for connection in late:
            connection.cut()
        self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            # asyncio takes one number for what it accepts at once and what the system keeps.
            listener.listen(LISTEN_BACKLOG)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._loop_error)
        watching = asyncio.create_task(self._watch(), name="connections")
        watching.add_done_callback(report)
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        settings = self.roster.settings
        shortest = min(settings.header_timeout_s, settings.body_timeout_s, settings.write_timeout_s)
        while True:
            await asyncio.sleep(min(0.25, shortest / 4))
            self.roster.check(time.monotonic())

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio cannot tell anybody. A socket that cannot be accepted for want of descriptors is
        tried again in a second. A failed task was to go on as long as the gateway, which ends: better no
        gateway than one that hears nobody. A failed callback was about one connection or request."""
        error = context.get("exception")
        if isinstance(error, OSError) and "accept" in str(context.get("message")):
            log.warning("connection.not_accepted", error=error)
            return
        log.error("loop.error", message=context.get("message"), exc_info=error)
        if is_a_failure(context) and "task" in context:
            self.failure = self.failure or error
            self.should_exit = True
