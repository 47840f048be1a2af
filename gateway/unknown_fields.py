"""Fields of a body that nobody knows: ignored and said so, or refused.

Owns: that policy, the response header that names them, and the log line. Clients send the extras of
other vendors, so ignoring is the default; a misspelled field must be seen all the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Literal

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from common.logs import get_logger
from gateway.metrics import GatewayMetrics

HEADER = b"x-pdq-ignored-fields"
LOG_INTERVAL_S = 60.0
MAX_NAME = 64

Policy = Literal["warn", "refuse"]

log = get_logger("http")


class UnknownFields:
    """What this gateway does about them."""

    def __init__(self, policy: Policy, metrics: GatewayMetrics) -> None:
        self._policy = policy
        self._counter = metrics.ignored_fields
        self._logged_at = -LOG_INTERVAL_S

    @property
    def are_refused(self) -> bool:
        return self._policy == "refuse"

    def ignored(self, unknown: Sequence[str], path: str) -> tuple[str, ...]:
        """A body's unknown fields as they are shown. `path` is the endpoint's, for the metric."""
        names = tuple(map(shown, unknown))
        if not names:
            return ()
        self._counter.labels(path).inc()
        if (now := time.monotonic()) >= self._logged_at + LOG_INTERVAL_S:
            self._logged_at = now
            log.warning("fields.ignored", path=path, fields=",".join(names))
        return names


def shown(name: str) -> str:
    """A client chooses the name, so nothing but plain ASCII of it goes into a header or a log."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:MAX_NAME])


class Warned(Response):
    """`response`, with a header that names the fields that were ignored."""

    def __init__(self, response: Response, names: Sequence[str]) -> None:
        super().__init__()
        self._response = response
        self._header = (HEADER, ", ".join(names).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def warned(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], self._header]}
            await send(message)

        await self._response(scope, receive, warned)
