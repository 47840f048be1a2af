"""A decode node drains: what runs there moves to the others, and no client notices.

One prefill and three decode nodes that take orders to fail (tests/support/slow_node.py). The truth
is the in-process engine's; afterwards nothing may be held anywhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from common.engine import Engine
from common.store.request_record import ChoiceRecord
from common.store.request_state import State
from common.store.requests import Requests
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Body, Load, bodies, truth
from tests.support.redis import wait_until

BEATS = ("--bus-beat-interval-s", "0.25")
ALL = os.environ.get("CHAOS") == "all"
ROOMY = ("--num-kv-blocks", "512", "--max-num-seqs", "32")


class Moving(Deployment):
    """`prefill-0`, `decode-1` and so on; orders for the nodes are files in `folder`."""

    def __init__(self, folder: Path, *flags: str, decode: int = 3) -> None:
        super().__init__(STORIES, prefill=1, decode=decode, flags=(*BEATS, *flags), gateway_flags=BEATS)
        self.folder = folder
        self.since_ms = 0.0  # requests before are another test's

    def start(self, name: str, module: str, *arguments: str) -> None:
        if module == "common.node":
            super().start(name, "tests.support.slow_node", *arguments, str(self.folder))
        else:
            super().start(name, module, *arguments)

    def give_order(self, at: str, fault: str) -> None:
        """The next decode node that gets to this point of a move does it."""
        unfinished = self.folder / "new"
        unfinished.write_text(json.dumps({"fault": fault}))
        unfinished.rename(self.folder / f"decode.{at}.json")

    def taken_by(self, names: dict[int, str]) -> str | None:
        """The node that has carried the order out; `names` by process id."""
        for path in self.folder.glob("taken.*"):
            return names[int(path.suffix[1:])]
        return None

    def forget_orders(self) -> None:
        for pattern in ("taken.*", "decode.*.json"):
            for path in self.folder.glob(pattern):
                path.unlink()

    async def choices(self, state: State | None = None) -> list[ChoiceRecord]:
        async with self.redis_client() as client:
            records = await Requests(client).recent()
        found = [c for r in records if r.accepted_at >= self.since_ms for c in r.choices]
        return [choice for choice in found if state in (None, choice.state)]

    async def names(self) -> dict[str, str]:
        """Of the living, by incarnation."""
        return {record.incarnation: name for name, record in (await self.records()).items()}

    async def count(self, metric: str) -> float:
        """Of the gateway, over all labels."""
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{self.url}/metrics")).text
        return sum(float(value) for value in re.findall(rf"^{metric}\S* (\S+)$", text, re.M))

    async def counts(self) -> dict[str, float]:
        names = ("moves", "retries", "mismatched_tokens", "prompt_tokens")
        return {name: await self.count(f"pdq_gateway_{name}_total") for name in names}

    async def decodes(self, *wanted: str) -> None:
        """Until each of these nodes works on something."""

        async def at_work() -> bool:
            names = await self.names()
            running = await self.choices(State.DECODING)
            return set(wanted) <= {names.get(c.decode_node) for c in running}

        await wait_until(at_work, f"{wanted} decode")

    async def all_handed_over(self, asked: list[Body]) -> tuple[str, int]:
        """Until every choice is with a decode node; the one that works on most, and on how many."""
        at_work: Counter[str] = Counter()

        async def handed_over() -> bool:
            names, choices = await self.names(), await self.choices()
            at_work.clear()
            at_work.update(names.get(c.decode_node, "") for c in choices if c.state is State.DECODING)
            wanted = sum(body.get("n", 1) for body in asked)
            return sum(c.state.rank >= State.DECODING.rank for c in choices) == wanted

        await wait_until(handed_over, "every choice is with a decode node")
        assert at_work, "nothing is left that could move"
        return at_work.most_common(1)[0]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: Any) -> Iterator[Moving]:
    with Moving(tmp_path_factory.mktemp("orders"), *ROOMY) as system:
        yield system


@pytest_asyncio.fixture
async def system(roomy: Moving) -> AsyncIterator[Moving]:
    roomy.forget_orders()
    roomy.start_missing()
    await roomy.wait_ready()
    roomy.since_ms = time.time() * 1000
    yield roomy
    await roomy.assert_idle()


def long_ones(count: int, seed: int) -> list[Body]:
    """Greedy and seeded, penalties, three choices, log probabilities; long enough to be moved."""
    asked = bodies(count, prompt=(5, 90), max_tokens=(220, 260), seed=seed)
    for index, body in enumerate(asked):
        body["ignore_eos"] = True
        if index % 3 == 1:
            body["logprobs"] = 2
    return asked


async def test_what_runs_moves_and_nothing_is_computed_twice(system: Moving, engine: Engine) -> None:
    asked = long_ones(8, seed=21)
    expected = truth(engine, asked)
    before = await system.counts()
    async with Load(system.url, asked) as load:
        drained, most = await system.all_handed_over(asked)
        assert await system.terminate(drained) == 0
        assert load.num_open > 0, "it has not waited for their end"
        names = await system.names()

        async def elsewhere() -> bool:
            holders = {names.get(c.decode_node) for c in await system.choices(State.DECODING)}
            return drained not in holders

        await wait_until(elsewhere, "`pdq requests` shows the nodes that go on")
        await load.finish(expected)
    after = await system.counts()
    gained = {name: after[name] - before[name] for name in after}
    assert 1 <= gained.pop("moves") <= most
    assert gained == {
        "retries": 0,
        "mismatched_tokens": 0,
        "prompt_tokens": sum(len(body["prompt"]) for body in asked),
    }
    assert {choice.attempt for choice in await system.choices()} == {1}


# Where the next decode node that gets there fails, and how. The first four are the receiver's.
POINTS = [
    ("take Offer", "kill"),
    ("take Blocks", "kill"),
    ("take Commit", "kill"),
    ("send Ack", "kill"),
    ("send Offer", "kill"),
    ("send Blocks", "kill"),
    ("send Commit", "kill"),
    ("take Ack", "kill"),
    ("take Offer", "stop"),
    ("take Blocks", "stop"),
    ("send Grant", "lose"),
    ("send Blocks", "lose"),
    ("send Commit", "lose"),
    ("send Ack", "lose"),
    ("send Blocks", "truncate"),
    ("send Ack", "truncate"),
    ("send Commit", "duplicate"),
]
SAMPLE = [
    ("send Ack", "kill"),
    ("take Offer", "stop"),
    # The other end of the same kill, and what the schedules of the protocol lose everywhere.
    pytest.param("send Blocks", "kill", marks=pytest.mark.slow),
    pytest.param("send Ack", "lose", marks=pytest.mark.slow),
]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("at", "fault"), POINTS if ALL else SAMPLE, ids=lambda text: text.replace(" ", "_"))
async def test_a_fault_in_the_middle_of_a_move_changes_no_token(
    system: Moving, engine: Engine, at: str, fault: str
) -> None:
    asked = long_ones(4, seed=100 + POINTS.index((at, fault)))
    again = [body | {"max_tokens": 20} for body in asked[:2]]  # what is cached is still theirs
    expected, expected_again = truth(engine, asked), truth(engine, again)
    async with Load(system.url, asked) as load:
        drained, _ = await system.all_handed_over(asked)
        pids = {process.pid: name for name, process in system.processes.items()}
        system.give_order(at, fault)
        draining = asyncio.create_task(system.terminate(drained))
        await wait_until(lambda: system.taken_by(pids) is not None, f"a move gets to {at!r}")
        victim = system.taken_by(pids)
        assert victim is not None
        if fault == "kill" and victim != drained:
            system.processes.pop(victim).wait()
        await load.finish(expected)
        if fault == "stop":
            system.signal(victim, signal.SIGCONT)
        assert await draining == (-signal.SIGKILL if victim == drained else 0)
    assert await system.count("pdq_gateway_mismatched_tokens_total") == 0
    await system.assert_idle()
    system.forget_orders()
    system.start_missing()
    await system.wait_ready()
    async with Load(system.url, again) as load:
        await load.finish(expected_again)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Moving]:
    with Moving(tmp_path, "--max-num-seqs", "4", decode=2) as system:
        yield system


@pytest.mark.slow  # tests/unit/decode_node/test_moving_out.py asks nodes that have no room
async def test_where_the_others_are_full_it_finishes_here(crowded: Moving, engine: Engine) -> None:
    asked = [body | {"n": 1} for body in long_ones(6, seed=31)]
    expected = truth(engine, asked)
    async with Load(crowded.url, asked) as load:
        await crowded.decodes("decode-1", "decode-2")
        assert await crowded.terminate("decode-1") == 0
        await load.finish(expected)
    counts = await crowded.counts()
    assert (counts["retries"], counts["mismatched_tokens"]) == (0, 0)
    await crowded.assert_idle()
