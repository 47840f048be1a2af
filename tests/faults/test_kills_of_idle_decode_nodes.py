"""kill -9 of decode nodes that compute prompts by themselves: nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.engine import Engine
from common.store.request_record import RequestRecord
from common.store.requests import Requests
from tests.faults.conftest import BEATS
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """Idle decode nodes take whatever would wait."""
    gateway_flags = (*BEATS, "--decode-prompt-tokens", "100000")
    with Deployment(STORIES, prefill=1, decode=2, flags=BEATS, gateway_flags=gateway_flags) as deployment:
        yield deployment


async def test_a_decode_node_dies_with_prompts_of_its_own(shared: Deployment, engine: Engine) -> None:
    asked = bodies(16, prompt=(300, 450), max_tokens=(20, 40))
    expected = truth(engine, asked)
    names = {record.incarnation: name for name, record in (await shared.records()).items()}
    async with Load(shared.url, asked) as load:
        own: list[str] = []

        async def computing() -> bool:
            async with shared.redis_client() as client:
                recent: list[RequestRecord] = await Requests(client).recent()
            nodes = [c.prefill_node for r in recent if not r.state.terminal for c in r.choices]
            own[:] = [name for node in nodes if (name := names.get(node, "")).startswith("decode")]
            return bool(own)

        await wait_until(computing, "a decode node has claimed a prompt")
        shared.kill(own[0])
        await load.finish(expected)
    await shared.assert_idle()
