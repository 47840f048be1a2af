"""Threads for calls into transports, so that the event loop never waits.

Opening and copying may wait for a peer, and closing ends such a wait, so each has threads of its own.
A few copies of one link run at once, and many of all links together, so that a stopped peer holds up
only itself. Threads start as they are needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.errors import PdqError
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Reader
from kv_transfer.transports.seam import guarded

OPENING = 16  # links that are opened or answered at once
CLOSING = 4
TRIES = 2  # to close something

T = TypeVar("T")


class Threads:
    """Threads for all links of one node. Foreign errors come out as `TransportFailed`."""

    def __init__(self, copies: int) -> None:
        """`copies`: pulls that run at once, over all links."""
        self._opening = ThreadPoolExecutor(OPENING, "kv-open")
        self._copying = ThreadPoolExecutor(copies, "kv-copy")
        self._closing = ThreadPoolExecutor(CLOSING, "kv-close")
        self.copies = asyncio.Semaphore(copies)

    def open(self, transport: str, call: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._opening, lambda: guarded(transport, call, *arguments))

    def pull(self, transport: str, reader: Reader, pieces: Sequence[Piece]) -> asyncio.Future[None]:
        """The caller holds one of `copies`, so the pull begins at once."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._copying, lambda: guarded(transport, reader.pull, pieces))

    async def close(self, transport: str, call: Callable[..., None], *arguments: object) -> None:
        """Try again what fails to close, and then leave it to the log."""
        loop = asyncio.get_running_loop()
        for _ in range(TRIES):
            try:
                await loop.run_in_executor(self._closing, lambda: guarded(transport, call, *arguments))
            except PdqError:
                continue
            return

    def end(self) -> None:
        """Wait for all calls to end, and stop the threads."""
        for executor in (self._opening, self._copying, self._closing):
            executor.shutdown()
