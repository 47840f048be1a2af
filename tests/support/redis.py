"""A real Redis for tests, a clean database for each, and the check that nothing is left in it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from common.request import Request
from common.settings.config import RedisSettings
from common.store.client import RedisClient, text
from common.store.server import EmbeddedRedis
from common.wire.messages import Dispatch
from tests.support.asked import a_request

# For whatever a test waits for: it comes in moments, or never. Long, so that it says nothing of how
# busy the machine is.
HANGS_S = 60.0


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """One server for the whole run; a test that stops it starts it again."""
    with EmbeddedRedis() as server:
        yield server


@pytest_asyncio.fixture
async def redis_client(redis_server: EmbeddedRedis) -> AsyncIterator[RedisClient]:
    """A client of an empty database. Afterwards a key without time to live fails the test."""
    client = RedisClient(RedisSettings(url=redis_server.url, timeout_s=2.0, retry_s=2.0))
    await client.command("FLUSHALL")
    await client.open()
    yield client
    leaks = await leaked_keys(client)
    await client.close()
    assert not leaks, f"keys without a time to live: {leaks}"


async def leaked_keys(client: RedisClient) -> list[str]:
    """Keys that live for ever and are not meant to."""
    keys = [text(key) for key in await client.command("KEYS", "*")]
    if not keys:
        return []
    times = await client.pipeline(*(("PTTL", key) for key in keys))
    permanent = client.keys.permanent()
    return sorted(k for k, t in zip(keys, times, strict=True) if t == -1 and k not in permanent)


class Traffic:
    """What Redis heard and said between `async with traffic` and its end, by itself: `received` and
    `sent` bytes, `commands` by name. Nobody else may talk to it meanwhile."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self.received = self.sent = 0
        self.commands: Counter[str] = Counter()

    async def __aenter__(self) -> None:
        await self._client.command("CONFIG", "RESETSTAT")

    async def __aexit__(self, *_: object) -> None:
        bytes_, calls = await self._client.pipeline(("INFO", "stats"), ("INFO", "commandstats"))
        self.received = int(bytes_["total_net_input_bytes"])
        self.sent = int(bytes_["total_net_output_bytes"])
        self.commands = Counter(
            {name.removeprefix("cmdstat_"): count["calls"] for name, count in calls.items()}
        )


async def wait_until(
    condition: Callable[[], Awaitable[bool] | bool], what: str, limit_s: float = HANGS_S
) -> None:
    """Return as soon as `condition` holds; fail with `what` if it does not come about."""
    deadline = asyncio.get_running_loop().time() + limit_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain until {what}"
        await asyncio.sleep(0.005)


OF_REQUESTS = frozenset(field.name for field in dataclasses.fields(Request))


def a_dispatch(
    request: str = "r-1",
    attempt: int = 1,
    choices: tuple[int, ...] = (0,),
    *,
    gateway: str = "gateway-1",
    prompt: int = 5,
    **fields: Any,
) -> Dispatch:
    """An attempt with a prompt of `prompt` tokens; `fields` of it, or of its request."""
    given = {"token_ids": tuple(range(prompt)), "gateway_endpoint": "tcp://127.0.0.1:1"} | fields
    asked = a_request(name=request, gateway=gateway, **{n: v for n, v in given.items() if n in OF_REQUESTS})
    own = {"decode_node": "", "decode_endpoint": ""} | {
        name: value for name, value in given.items() if name not in OF_REQUESTS
    }
    return Dispatch(asked, attempt, choices, **own)
