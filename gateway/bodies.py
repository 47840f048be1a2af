"""The bytes of request bodies: how many one request, one client and all of them may hold.

Owns: the budget. A body counts from its first byte until it has become a request; the first
64 KiB of each are free, since the limit on connections bounds them already.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from starlette.requests import Request

from common.errors import Overloaded
from gateway.errors import BodyTooLarge

FREE_BYTES = 65_536


class BodyBudget:
    """`total` bytes for all bodies that are here at one time, half of them for one client."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes that count now."""
        return self._held.total()

    @contextlib.contextmanager
    def share(self, client: str) -> Iterator[Share]:
        """Yield the share of one body of `client`, and give its bytes back at the end."""
        share = Share(self, client)
        try:
            yield share
        finally:
            self._held[client] -= share.held
            if not self._held[client]:
                del self._held[client]

    def take(self, client: str, count: int) -> None:
        """Raises `Overloaded` when all bodies, or those of `client`, would hold too much."""
        if self.held + count > self._total or self._held[client] + count > self._total // 2:
            raise Overloaded(
                f"the bodies that are being read hold {self.held} bytes, of {self._total} at most; "
                f"yours {self._held[client]}"
            )
        self._held[client] += count


class Share:
    """The part of a `BodyBudget` that one body holds."""

    def __init__(self, budget: BodyBudget, client: str) -> None:
        self._budget, self._client = budget, client
        self._size = 0
        self.held = 0

    def grow(self, count: int) -> None:
        self._size += count
        more = max(0, self._size - FREE_BYTES) - self.held
        self._budget.take(self._client, more)
        self.held += more


async def read_body(request: Request, limit: int, share: Share) -> bytes:
    """The whole body; raises `BodyTooLarge` over `limit` bytes, `Overloaded` over the budget."""
    too_large = BodyTooLarge(f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
        share.grow(len(chunk))
    return bytes(body)
