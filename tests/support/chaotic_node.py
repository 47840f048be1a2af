"""A real node on a bad bus: `python -m tests.support.chaotic_node … FOLDER`.

What comes before FOLDER are the flags of a node. At each KV message that it sends or takes, the bus
looks whether FOLDER holds an order for this role and this point, takes it (once, whichever node
comes first), and does what it says: to this process, to this frame, or to all frames for a while.
Production code is not changed: the process builds its node with this bus in place of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common.node.runtime as runtime
from common.bus import Bus
from common.codec import decode
from common.config import NodeSettings, load
from common.errors import LinkLost, MalformedMessage
from common.messages import Blocks, Message
from kv_transfer.link import TRANSFER_MESSAGES

FOLDER = Path()
KILLS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def order(folder: Path, role: str, point: str) -> dict[str, Any] | None:
    """The order for this moment, if there is one, and nobody else was faster."""
    path = folder / f"{role}.{point}.json"
    taken = folder / f"taken.{role}.{point}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        path.rename(taken)
        found: dict[str, Any] = json.loads(taken.read_text())
        return found
    return None


class ChaoticBus(Bus):
    """Loses, breaks and holds up frames, and stops or kills its own process, on order."""

    node: Any = None
    role = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open = asyncio.Event()
        self._open.set()
        self._held: list[tuple[Any, Sequence[bytes]]] = []
        self._random = random.Random(1)

    def _send(self, link: Any, frames: Sequence[bytes]) -> None:
        message = decode(frames[0])
        if isinstance(message, TRANSFER_MESSAGES):
            frames = self._at(f"send {type(message).__name__}", message, link, frames)
        if not self._open.is_set():
            self._held.append((link, frames))
        elif frames:
            super()._send(link, frames)

    async def receive(self) -> Any:
        received = await super().receive()
        if isinstance(received.message, TRANSFER_MESSAGES):
            self._at(f"take {type(received.message).__name__}", received.message, None, ())
        return received

    async def _read(self, socket: Any, link: Any) -> None:
        await super()._read(_Gated(socket, self._open), link)

    def _at(
        self, point: str, message: Message, link: Any, frames: Sequence[bytes]
    ) -> Sequence[bytes]:
        found = order(FOLDER, self.role, point)
        if found is None:
            return frames
        fault = found["fault"]
        loop = asyncio.get_running_loop()
        if fault in KILLS:
            os.kill(os.getpid(), KILLS[fault])
        elif fault == "cut":
            self._open.clear()
            loop.call_later(found["seconds"], self._heal)
        elif fault == "duplicate":
            for delay in (0.0, 0.2, 3.0):
                loop.call_later(delay, self._again, link, frames)
        elif fault == "reorder":
            loop.call_later(0.2, self._again, link, frames)
            return ()
        elif fault == "lose":
            return ()
        elif fault == "abort":
            return frames  # the test does that, from outside
        elif fault == "slab":
            assert isinstance(message, Blocks)
            self.node.memory.slab(message.slots[0])[0] ^= 1
        else:
            return (self._broken(fault, frames[0]), *frames[1:])
        return frames

    def _broken(self, fault: str, frame: bytes) -> bytes:
        if fault == "truncate":
            return frame[: len(frame) // 2]
        if fault == "version":
            return bytes([frame[0] + 1]) + frame[1:]
        assert fault == "corrupt"
        while True:  # bytes that the codec refuses: others are another message, and its own case
            at = self._random.randrange(1, len(frame))
            broken = frame[:at] + bytes([self._random.randrange(256)]) + frame[at + 1 :]
            try:
                decode(broken)
            except MalformedMessage:
                return broken

    def _again(self, link: Any, frames: Sequence[bytes]) -> None:
        with contextlib.suppress(LinkLost):
            if self.link(link.peer) == link.id:
                super()._send(link, frames)

    def _heal(self) -> None:
        self._open.set()
        held, self._held = self._held, []
        for link, frames in held:
            self._again(link, frames)


class _Gated:
    """A socket from which nothing comes while the gate is shut."""

    def __init__(self, socket: Any, gate: asyncio.Event) -> None:
        self._socket, self._gate = socket, gate

    async def recv_multipart(self) -> Any:
        frames = await self._socket.recv_multipart()
        await self._gate.wait()
        return frames


async def serve(settings: NodeSettings) -> None:
    runtime.Bus = ChaoticBus  # type: ignore[misc]
    ChaoticBus.role = settings.role
    node = runtime.Node(settings)
    ChaoticBus.node = node
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, node.stop)
    await node.run()


def main() -> None:
    global FOLDER
    FOLDER = Path(sys.argv[-1])
    asyncio.run(serve(load(NodeSettings, sys.argv[1:-1], os.environ, program="node")))


if __name__ == "__main__":
    main()
