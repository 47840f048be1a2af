"""A real node on a bad bus: `python -m tests.support.chaotic_node … FOLDER`.

What comes before FOLDER are the flags of a node. At each KV message that it sends or takes, the bus
looks whether FOLDER holds an order for this role and this point, takes it (once, whichever node
comes first), and does what it says: to this process, to its cable, or to this frame. What the node
holds is written down beside the orders whenever it changes, for a test that cannot ask.
Production code is not changed: the process builds its node with this bus in place of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common.errors import LinkLost, MalformedMessage
from common.logs import configure
from common.node.app import Node
from common.settings.config import NodeSettings, load
from common.wire.bus import Bus
from common.wire.bus_setup import with_bus
from common.wire.codec import decode
from common.wire.message import HandoffMessage, LinkMessage, Message
from common.wire.messages import Blocks

LOOK_S = 0.02  # between two looks at what is held

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
    """Loses, breaks and holds up messages, and stops or kills its own process, on order."""

    node: Any = None
    role = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._random = random.Random(1)

    def _send(self, link: Any, frame: bytes) -> None:
        message = decode(frame)
        if isinstance(message, (LinkMessage, HandoffMessage)):
            frame = self._at(f"send {type(message).__name__}", message, link, frame)
        if frame:
            super()._send(link, frame)

    async def receive(self) -> Any:
        received = await super().receive()
        if isinstance(received.message, (LinkMessage, HandoffMessage)):
            self._at(f"take {type(received.message).__name__}", received.message, None, b"")
        return received

    def _at(self, point: str, message: Message, link: Any, frame: bytes) -> bytes:
        found = order(FOLDER, self.role, point)
        if found is None:
            return frame
        fault = found["fault"]
        loop = asyncio.get_running_loop()
        if fault in KILLS:
            os.kill(os.getpid(), KILLS[fault])
        elif fault == "cut":
            subprocess.run(found["commands"][self.node.name], check=True)
        elif fault == "duplicate":
            for delay in (0.0, 0.2, 3.0):
                loop.call_later(delay, self._again, link, frame)
        elif fault == "reorder":
            loop.call_later(0.2, self._again, link, frame)
            return b""
        elif fault == "lose":
            return b""
        elif fault == "abort":
            return frame  # the test does that, from outside
        elif fault == "slab":
            assert isinstance(message, Blocks)
            self.node.memory.slab(message.slots[0])[0] ^= 1
        else:
            return self._broken(fault, frame)
        return frame

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

    def _again(self, link: Any, frame: bytes) -> None:
        with contextlib.suppress(LinkLost):
            if self.link(link.peer) == link.id:
                super()._send(link, frame)


class Notes:
    """What the node holds, for whom, in `state.PID.json`."""

    def __init__(self, node: Any, folder: Path) -> None:
        self._node, self._path = node, folder / f"state.{os.getpid()}.json"
        self._peers: dict[str, str] = {}  # link → peer, of every link there has been

    async def keep(self) -> None:
        before: dict[str, Any] | None = None
        while True:
            now = self._look()
            if now != before:
                unfinished = self._path.with_suffix(".new")
                unfinished.write_text(json.dumps(now))
                unfinished.rename(self._path)
                before = now
            await asyncio.sleep(LOOK_S)

    def _look(self) -> dict[str, Any]:
        node = self._node
        links = node.links.describe()
        self._peers.update((row["link"], row["peer"]) for row in links)
        leases, scheduler = node.leases, node.engine.scheduler
        of: Counter[str] = Counter()
        of.update(self._peers.get(key.link, "?") for key in node.links.handoffs())
        of.update(self._peers.get(key.link, "?") for key in node.links.intakes())
        of.update(self._peers.get(key.link, "?") for key in list(leases._open))
        of.update(self._peers.get(lease.link, "?") for lease in list(leases._ending))
        of.update(self._peers.get(link, "?") for link in list(leases._touched))
        of.update(row["peer"] for row in links)
        held = {
            "used blocks": node.engine.pool.num_blocks - node.engine.pool.num_free,
            "waiting": scheduler.num_waiting,
            "running": scheduler.num_running,
            "open": node.role.num_open,
            "leases": sum(leases.count().values()),
            "reserved": node.kv.num_reserved,
            "unacknowledged": node.gateways.tokens.num_unacknowledged,
        }
        return {"held": {name: n for name, n in held.items() if n}, "of": dict(of)}


async def serve(settings: NodeSettings, parts: dict[str, Any]) -> None:
    ChaoticBus.role = settings.role
    node = Node(with_bus(settings, os.environ), make_bus=ChaoticBus, **parts)
    ChaoticBus.node = node
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, node.stop)
    notes = asyncio.create_task(Notes(node, FOLDER).keep())
    try:
        await node.run()
    finally:
        notes.cancel()


def main(**parts: Any) -> None:
    global FOLDER
    FOLDER = Path(sys.argv[-1])
    settings = load(NodeSettings, sys.argv[1:-1], os.environ, program="node")
    configure(settings.name, settings.log.level)
    asyncio.run(serve(settings, parts))


if __name__ == "__main__":
    main()
