"""A real node that also writes down when things happened: `python -m bench.node_clock … FILE`.

What comes before FILE are the flags of a node. One JSON line per happening, with the machine's monotonic
clock, which all processes of a host share. The node's code is not changed: its role, its
runner, and the readers of its transports are wrapped.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common.engine import StepOutput
from common.engine.core.step import Step
from common.engine.interface import StepResult
from common.node.app import Node, load_role
from common.node.ports import NodeServices
from common.settings.config import NodeSettings, load
from common.wire.bus_setup import with_bus
from kv_transfer.ports import Adopted, Piece
from kv_transfer.transports.nixl import NixlReader
from kv_transfer.transports.shm import ShmReader
from kv_transfer.transports.tcp import TcpReader

Note = Callable[..., None]


class ClockedRole:
    """A role, and what it is told: written down, then passed on."""

    def __init__(self, role: Any, note: Note) -> None:
        self._role, self._note = role, note
        self._decoding: set[str] = set()
        self._computed_at = 0.0  # in the engine's thread, of the step that ended last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._role, name)

    def clock_steps(self, engine: Any) -> None:
        run = engine.runner.inner.run

        def clocked(*arguments: Any) -> StepResult:
            result = run(*arguments)
            self._computed_at = time.monotonic()
            return result

        engine.runner.inner.run = clocked

    def step_begins(self, step: Step) -> None:
        now = time.monotonic()
        for chunk in step.chunks:
            name = chunk.sequence.request_id
            if not chunk.is_prompt and name not in self._decoding:
                self._decoding.add(name)
                self._note("first step", now, request=name)
        self._role.step_begins(step)

    def step_ended(self, step: Step, outputs: list[StepOutput]) -> None:
        self._role.step_ended(step, outputs)
        for chunk in step.chunks:
            if chunk.is_prompt:
                name, end = chunk.sequence.request_id, chunk.end
                self._note("chunk", self._computed_at, request=name, end=end)

    def arrived(self, adopted: Adopted) -> None:
        self._note("adopted", request=f"{adopted.offer.key.request}/{adopted.offer.key.attempt}")
        self._role.arrived(adopted)


def clock_pulls(reader: type[Any], note: Note) -> None:
    pull = reader.pull

    def clocked(self: Any, pieces: Sequence[Piece]) -> None:
        begin = time.monotonic()
        pull(self, pieces)
        note("pull", begin=begin, pieces=len(pieces))

    reader.pull = clocked


async def serve(settings: NodeSettings, note: Note) -> None:
    def make_role(name: str, node: NodeServices) -> Any:
        return ClockedRole(load_role(name, node), note)

    node = Node(with_bus(settings, os.environ), make_role=make_role)
    node.role.clock_steps(node.engine)  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, node.stop)
    await node.run()


def main() -> None:
    file = open(sys.argv[-1], "a", buffering=1)  # noqa: SIM115  (until the process ends)

    def note(what: str, at: float = 0.0, **fields: object) -> None:
        file.write(json.dumps({"what": what, "at": at or time.monotonic(), **fields}) + "\n")

    for reader in (ShmReader, TcpReader, NixlReader):
        clock_pulls(reader, note)
    settings = load(NodeSettings, sys.argv[1:-1], os.environ, program="node")
    if settings.engine.cores:  # as a node's own main does, before there are threads
        os.sched_setaffinity(0, settings.engine.cores)
    asyncio.run(serve(settings, note))


if __name__ == "__main__":
    main()
