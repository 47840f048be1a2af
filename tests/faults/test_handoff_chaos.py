"""A fault at each moment of a handoff, with real processes: `make chaos-handoff` runs the matrix,
`make test` a sample of it.

Two prefill and two decode nodes on a bus that does what it is told at a named message
(tests/support/chaotic_node.py). After each fault: every request ends with the right tokens or a
typed error, everything is idle again within the limit, and new requests are served.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.engine import Engine
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

BEATS = ("--bus-beat-interval-s", "0.25")  # silent for 1.5 s is dead
DECLARED_S = 2.5  # until a death is declared at the latest, on a busy machine
IDLE_S = 5.0  # from then until nothing is left
STOPPED_S = 4.0

# (role, point), in the order of a handoff
POINTS = {
    "before OFFER": ("prefill", "send Offer"),
    "OFFER is here": ("decode", "take Offer"),
    "GRANT leaves": ("decode", "send Grant"),
    "mid-blocks, sender": ("prefill", "send Blocks"),
    "mid-blocks, receiver": ("decode", "take Blocks"),
    "COMMIT is here": ("decode", "take Commit"),
    "ACK leaves": ("decode", "send Ack"),
    "ACK is here": ("prefill", "take Ack"),
}
SENDING = {"before OFFER", "GRANT leaves", "mid-blocks, sender", "ACK leaves"}
PROCESS = ("kill", "stop", "cut 1", "cut 10", "cut 60")
FRAMES = ("corrupt", "truncate", "duplicate", "reorder", "lose", "version")
MATRIX = (
    [(point, fault) for point in POINTS for fault in PROCESS]
    + [(point, fault) for point in POINTS if point in SENDING for fault in FRAMES]
    + [("mid-blocks, sender", "slab")]
    + [(point, "abort") for point in POINTS]
)  # fmt: skip
SAMPLE = [
    ("before OFFER", "kill"), ("OFFER is here", "stop"), ("GRANT leaves", "truncate"),
    ("mid-blocks, sender", "slab"), ("mid-blocks, receiver", "kill"), ("ACK leaves", "lose"),
    ("COMMIT is here", "cut 1"), ("ACK is here", "abort"),
]  # fmt: skip
ALL = os.environ.get("CHAOS") == "all"


class Chaotic(Deployment):
    """Nodes that take orders from `folder`."""

    def __init__(self, folder: Path, transport: str) -> None:
        flags = ("--transports", transport, *BEATS, str(folder))
        super().__init__(STORIES, prefill=2, decode=2, flags=flags, gateway_flags=BEATS)
        self.folder = folder

    def start(self, name: str, module: str, *arguments: str) -> None:
        chaotic = "tests.support.chaotic_node"
        super().start(name, chaotic if module == "common.node" else module, *arguments)

    def give_order(self, point: str, fault: str) -> None:
        role, at = POINTS[point]
        name, _, seconds = fault.partition(" ")
        path = self.folder / f"{role}.{at}.json"
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps({"fault": name, "seconds": float(seconds or 0)}))
        unfinished.rename(path)

    def taken_by(self) -> str | None:
        """The node that has carried the order out."""
        for path in self.folder.glob("taken.*"):
            pid = int(path.suffix[1:])
            for name, process in self.processes.items():
                if process.pid == pid:
                    return name
        return None

    def forget_orders(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


@pytest.fixture(scope="module", params=["shm", "tcp"] if ALL else ["shm"])
def chaotic(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Chaotic]:
    with Chaotic(tmp_path_factory.mktemp("orders"), request.param) as system:
        yield system


async def wait_idle(system: Chaotic, since: float) -> None:
    await system.assert_idle()
    elapsed = time.monotonic() - since
    assert elapsed <= DECLARED_S + IDLE_S, f"idle only after {elapsed:.1f} s"


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("point", "fault"), MATRIX if ALL else SAMPLE, ids=lambda text: text.replace(" ", "_")
)
async def test_after_a_fault_everything_ends_right_and_nothing_is_left(
    chaotic: Chaotic, engine: Engine, point: str, fault: str
) -> None:
    system = chaotic
    seed = 100 + MATRIX.index((point, fault))  # prompts that no decode node holds already
    asked = bodies(6, prompt=(300, 440), max_tokens=(10, 30), seed=seed)  # two chunks each
    expected = truth(engine, asked)
    system.forget_orders()
    system.give_order(point, fault)
    async with Load(system.url, asked) as load:
        await wait_until(lambda: system.taken_by() is not None, f"a node gets to {point!r}")
        victim, struck_at = system.taken_by(), time.monotonic()
        assert victim is not None
        if fault == "abort":
            for task in load.tasks:
                task.cancel()
            await asyncio.gather(*load.tasks, return_exceptions=True)
        elif fault == "kill":
            system.processes.pop(victim).wait()
        elif fault == "stop":
            await asyncio.sleep(STOPPED_S)
            system.signal(victim, signal.SIGCONT)
        if fault != "abort":
            ended_at = await load.finish(expected, may_fail=True)
            assert ended_at < struck_at + 15.0, "the others take over"
        if fault.startswith("cut"):
            await asyncio.sleep(max(0.0, struck_at + float(fault[4:]) - time.monotonic()))
    await wait_idle(system, time.monotonic())
    system.start_missing()
    await system.wait_ready()
    async with Load(system.url, asked[:2]) as load:
        await load.finish(expected[:2])
    await system.assert_idle()
