"""No accepted request is ever without somebody responsible for it, and nothing is left in Redis.

Any sequence of pulls, deaths, drains, broken links and lost answers, on a real Redis.
"""

from __future__ import annotations

import asyncio

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.errors import ServiceUnavailable
from common.store.registry import Role
from common.store.server import EmbeddedRedis
from gateway.placement import DispatchLimits
from tests.support.redis import redis_server
from tests.support.scripted_nodes import World, answer

__all__ = ["redis_server"]

STEPS = (
    "ask",
    "take",
    "speak",
    "compute",
    "hand over",
    "pull",
    "kill",
    "notice",
    "drain",
    "start",
    "break",
    "mend",
    "look",
    "lose",
    "cancel",
    "late pull",
    "late read",
)
Step = tuple[str, int, int]


# What is done after a while is done at the next look.
IMPATIENT = DispatchLimits(max_attempts=1000, unheard_s=0.0, quiet_s=0.0)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a loss takes the whole time limit to show, so nothing is shrunk
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    separate=st.booleans(),
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 7), st.integers(0, 7)), min_size=8, max_size=40
    ),
)
def test_whatever_happens_every_accepted_request_ends_and_nothing_is_left(
    redis_server: EmbeddedRedis, separate: bool, steps: list[Step]
) -> None:
    roles = [Role.PREFILL, Role.DECODE] if separate else [Role.UNIFIED]
    asyncio.run(_play(redis_server.url, roles, steps))


async def _play(url: str, roles: list[Role], steps: list[Step]) -> None:
    async with World(url, limits=IMPATIENT) as world:
        world.strays_interval_s = 0.0
        for role in 2 * roles:
            await world.start_node(role)
        await world.ask()
        for step in steps:
            await _do(world, roles, *step)
        await world.end()
        for task in world.asked:
            if task.cancelled():
                continue
            error = task.exception()
            # Only a request whose acceptance was never confirmed may fail.
            assert error is None or isinstance(error, ServiceUnavailable), error
            if error is None:
                assert task.result() == answer(len(task.result()))
        assert await world.left_behind() == []


async def _do(world: World, roles: list[Role], step: str, first: int, second: int) -> None:
    nodes = list(world.living.values())
    node = nodes[first % len(nodes)] if nodes else None
    everybody = [*world.living, *world.dead]
    if step == "ask" and len(world.asked) < 6:
        await world.ask(1 + first % 3)
    elif step == "look":
        await world.look()
    elif step == "notice":
        world.notice()
    elif step == "start" and len(nodes) < 4 * len(roles):
        await world.start_node(roles[first % len(roles)])
    elif step == "cancel" and world.asked:
        world.asked[first % len(world.asked)].cancel()
    elif node is None:
        return
    elif step == "take":
        await world.take(node)
    elif step == "speak":
        world.speak(node)
    elif step == "compute":
        await world.compute(node)
    elif step == "hand over":
        await world.hand_over(node, nodes[second % len(nodes)])
    elif step == "pull":
        await world.pull(node, everybody[second % len(everybody)])
    elif step == "late read":
        await world.late_read(node)
    elif step == "late pull" and world.dead:
        gone = world.dead[first % len(world.dead)]
        await world.late_pull(gone, everybody[second % len(everybody)])
    elif step == "kill":
        world.kill(node)
    elif step == "drain":
        await world.drain(node, everybody[second % len(everybody)])
    elif step == "break":
        world.break_link(node)
    elif step == "mend":
        world.mend_link(node)
    elif step == "lose":
        (world.gateway if second % 4 == 0 else node.client).answers_to_lose += 1 + second % 2
