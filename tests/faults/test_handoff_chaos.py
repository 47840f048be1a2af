"""A fault at each moment of a handoff, with real processes: `make chaos-handoff` runs the matrix,
`make test` a sample of it.

Two prefill and two decode nodes, each in a network namespace of its own where these can be made, on
a bus that does what it is told at a named message (tests/support/chaotic_node.py). After each fault:
every request ends with the right tokens or a typed error, the others serve on, nothing of the dead
is left at a survivor 5 seconds after that survivor has declared it dead, and no process holds more
than it did when it was idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.engine import Engine
from tests.support.chaos import Chaotic
from tests.support.load import Load, bodies, truth
from tests.support.network import NoNamespaces, network
from tests.support.redis import wait_until

STOPPED_S = 4.0
SHORT = "cut 1"  # nobody may have noticed

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
)
SAMPLE = [
    ("before OFFER", "kill"),
    ("OFFER is here", "stop"),
    ("GRANT leaves", "truncate"),
    ("mid-blocks, sender", "slab"),
    ("mid-blocks, receiver", "kill"),
    ("ACK leaves", "lose"),
    ("COMMIT is here", "cut 1"),
    ("ACK is here", "abort"),
]
ALL = os.environ.get("CHAOS") == "all"
TABLE = os.environ.get("CHAOS_TABLE")  # a file, to which each case adds its row


@pytest.fixture(scope="module", params=["shm", "tcp", "tcp-plain"] if ALL else ["shm"])
def chaotic(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Chaotic]:
    folder = tmp_path_factory.mktemp("chaos")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(network())
        except NoNamespaces as reason:
            print(f"all nodes on loopback: {reason}")
            made = None
        yield stack.enter_context(Chaotic(folder, request.param, made))


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("point", "fault"), MATRIX if ALL else SAMPLE, ids=lambda text: text.replace(" ", "_")
)
async def test_after_a_fault_everything_ends_right_and_nothing_is_left(
    chaotic: Chaotic, engine: Engine, point: str, fault: str
) -> None:
    system = chaotic
    kind = fault.partition(" ")[0]
    if kind == "cut" and system.network is None:
        pytest.skip("no network namespaces can be made here: ip, nsenter, and root are needed")
    seed = 100 + MATRIX.index((point, fault))  # prompts that no decode node holds already
    asked = bodies(6, prompt=(300, 440), max_tokens=(10, 30), seed=seed)  # two chunks each
    later = bodies(4, prompt=(30, 60), max_tokens=(5, 10), seed=seed + 1000)
    expected, expected_later = truth(engine, asked), truth(engine, later)
    await system.settle()
    nodes = {name: await system.dead(name) for name in system.roles}
    system.forget_orders()
    given_at = time.time()
    system.give_order(*POINTS[point], kind)
    seconds_of: dict[str, dict[str, float]] = {}
    declared: dict[str, float] = {}
    async with system.made_good():
        async with Load(system.url, asked) as load:
            await wait_until(lambda: system.taken_by() is not None, f"a node gets to {point!r}")
            victim, struck_at = system.taken_by(), time.monotonic()
            assert victim is not None
            if kind == "kill":
                system.processes.pop(victim).wait()
            if kind != "abort":
                finishing = asyncio.create_task(load.finish(expected, may_fail=True))
                if kind in ("kill", "stop", "cut") and fault != SHORT:
                    declared = await nodes[victim].wait_declared(given_at)
                    seconds_of["declared"] = {name: at - given_at for name, at in declared.items()}
                    seconds_of["gone"] = await nodes[victim].wait_gone(declared)
                assert await finishing < struck_at + 15.0, "the others take over"
        ended_at = time.time()
        since = {n: max(declared.get(n, 0.0), ended_at) for n in system.processes if n != victim}
        if declared:  # the victim is still away: the others serve on without it
            seconds_of["idle"] = await system.wait_idle(since)
            await serves(system, later, expected_later)
            since = dict.fromkeys(since, time.time())
        if kind == "cut" and declared:  # to the victim, all others are dead
            at = await system.wait_all_declared(victim, given_at)
            seconds_of["victim idle"] = await system.wait_idle({victim: at})
        await asyncio.sleep(max(0.0, struck_at + away_s(fault) - time.monotonic()))
        system.make_good(victim)
        if kind != "kill":
            since |= {victim: time.time()}
        seconds_of["idle again" if declared else "idle"] = await system.wait_idle(since)
        system.start_missing()
        await system.wait_ready()
        system.check_sockets()
        await serves(system, later, expected_later)
        await system.assert_idle()
    note(system, point, fault, load, seconds_of)


def away_s(fault: str) -> float:
    """How long the victim stays away after the fault, where it comes back."""
    kind, _, seconds = fault.partition(" ")
    return STOPPED_S if kind == "stop" else float(seconds or 0)


async def serves(system: Chaotic, asked: Sequence[Any], expected: Any) -> None:
    async with Load(system.url, asked) as load:
        await load.finish(expected)


def note(
    system: Chaotic, point: str, fault: str, load: Load, seconds_of: dict[str, dict[str, float]]
) -> None:
    """One row of the table of `make chaos-handoff`."""
    errors = Counter(client.error["code"] for client in load.clients if client.error)
    right = sum(bool(client.ended_at) and client.error is None for client in load.clients)
    came = [f"{right} right", *(f"{count} {code}" for code, count in errors.items())]
    if fault == "abort":
        came = ["all disconnected"]
    times = [f"{what} {max(found.values()):.2f} s" for what, found in seconds_of.items()]
    text = " | ".join([point, fault, system.transport, ", ".join(came), "; ".join(times)])
    print(text)
    if TABLE:
        with Path(TABLE).open("a") as file:
            file.write(text + "\n")
