"""kill -9 of a node that drafts tokens: what goes on elsewhere has the tokens it would have had anyway."""

from __future__ import annotations

import itertools

from common.engine import Engine
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until


async def drafted(system: Deployment) -> dict[str, int]:
    """Tokens, by decode node."""
    records = await system.records()
    return {name: records[name].drafted_tokens for name in ("decode-2", "decode-3")}


async def test_what_was_drafted_when_a_node_dies_leaves_no_trace(system: Deployment, engine: Engine) -> None:
    asked = bodies(16, max_tokens=(300, 400), seed=5)
    for index, body in enumerate(asked):
        cycle = itertools.cycle(range(20, 24 + index))
        body["prompt"] = [1, *itertools.islice(cycle, 70)]
    expected = truth(engine, asked)
    before = await drafted(system)
    async with Load(system.url, asked) as load:

        async def both_draft() -> bool:
            return all(now > before[name] for name, now in (await drafted(system)).items())

        await wait_until(both_draft, "both decode nodes draft")
        assert load.num_open
        system.kill("decode-2")
        await load.finish(expected)
    await system.assert_idle()
    record = (await system.records())["decode-3"]
    assert (record.speculative, record.accepted_tokens > 0) == ("ngram", True)
