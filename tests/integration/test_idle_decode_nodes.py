"""A prefill and a decode node, and a gateway, in this process: an idle decode node computes prompts, too."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from common.identity import ModelIdentity
from common.metrics import Metrics
from common.request import Request
from common.sampling import SamplingParams
from common.settings.config import EngineSettings
from common.store.client import RedisClient
from common.store.registry import NodeRecord, Registry
from common.store.requests import Requests
from common.wire.bus import Bus
from common.wire.senders import TO_GATEWAYS
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.node_links import NodeLinks
from gateway.open_request import Work
from gateway.placement import DispatchLimits
from gateway.prefix_index import PrefixIndex
from gateway.record_store import RecordStore
from gateway.router import LeastLoadedRouter
from tests.support.bus_key import bus_settings
from tests.support.checkpoints import STORIES
from tests.support.engines import poisoned_engine
from tests.support.metrics import Scrape, parsed, scrape
from tests.support.redis import wait_until
from tests.support.running_nodes import running

ENGINE = EngineSettings(
    model=str(STORIES),
    dtype="float32",
    threads=1,
    num_kv_blocks=256,
    max_num_seqs=16,
    max_num_batched_tokens=128,
)
PROMPTS = [[(7 * number + place) % 500 + 3 for place in range(50 + number)] for number in range(16)]


def params(number: int) -> SamplingParams:
    return SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=number)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    prefill: NodeRecord
    decode: NodeRecord
    dispatcher: Dispatcher
    metrics: GatewayMetrics

    async def ask(self, number: int) -> list[int]:
        model = ModelIdentity(self.decode.model, self.decode.revision, self.decode.tokenizer)
        prompt = tuple(PROMPTS[number])
        asked = Request(f"r{number}", model, prompt, len(prompt), params(number))
        async with self.dispatcher.run(Work(asked)) as request:
            return [token.token_id async for update in request.updates() for token in update.tokens]

    def counted(self) -> Scrape:
        return parsed(self.metrics.render().decode())


@contextlib.asynccontextmanager
async def a_pair(redis: RedisClient, decode_prompt_tokens: int) -> AsyncIterator[Pair]:
    index, requests, metrics = PrefixIndex(), Requests(redis), GatewayMetrics(Metrics())
    async with (
        running(redis, ENGINE, "prefill", "decode") as (prefill, decode),
        Bus("gateway-1", bus_settings(), hears=TO_GATEWAYS) as bus,
    ):
        links = NodeLinks(bus, Registry(redis), requests, index)
        dispatcher = Dispatcher(
            gateway="gateway-1",
            store=RecordStore(requests),
            bus=links,
            directory=links,
            router=LeastLoadedRouter(index, decode_prompt_tokens=decode_prompt_tokens),
            limits=DispatchLimits(),
            metrics=metrics,
        )
        links.inbox = dispatcher
        linking = asyncio.create_task(links.run())
        model = ModelIdentity(decode.model, decode.revision, decode.tokenizer)
        await wait_until(lambda: dispatcher.ready(model) is None, "both nodes are linked")
        yield Pair(prefill, decode, dispatcher, metrics)
        await dispatcher.shut_down()
        linking.cancel()
        await asyncio.gather(linking, return_exceptions=True)


def truth() -> list[list[int]]:
    engine = poisoned_engine()
    return [
        list(engine.generate([prompt], params(number))[0].token_ids) for number, prompt in enumerate(PROMPTS)
    ]


async def test_of_sixteen_fresh_prompts_an_idle_decode_node_computes_some_with_the_same_tokens(
    redis_client: RedisClient,
) -> None:
    expected = await asyncio.to_thread(truth)
    async with a_pair(redis_client, decode_prompt_tokens=512) as pair:
        assert await asyncio.gather(*map(pair.ask, range(16))) == expected
        prefill, decode = await scrape(pair.prefill.url), await scrape(pair.decode.url)
        recent = await Requests(redis_client).recent()
    here = [record for record in recent if record.choices[0].prefill_node == pair.decode.incarnation]
    assert 0 < len(here) < 16
    assert all(record.choices[0].decode_node == pair.decode.incarnation for record in recent)
    placed = pair.counted()
    assert placed.get("pdq_gateway_placements_total", role="decode") == len(here)
    assert placed.get("pdq_gateway_placements_total", role="prefill") == 16 - len(here)
    computed = sum(len(PROMPTS[int(record.request[1:])]) for record in here)
    assert computed <= 512
    assert decode["pdq_prompt_tokens_total"] == computed
    assert prefill["pdq_prompt_tokens_total"] == sum(map(len, PROMPTS)) - computed
    handed = decode.get("pdq_handoffs_total", end="intake", transport="shm", outcome="adopted")
    assert handed == 16 - len(here)


async def test_by_setting_a_decode_node_computes_no_prompt(redis_client: RedisClient) -> None:
    async with a_pair(redis_client, decode_prompt_tokens=0) as pair:
        await asyncio.gather(*map(pair.ask, range(8)))
        decode = await scrape(pair.decode.url)
    assert pair.counted().get("pdq_gateway_placements_total", role="prefill") == 8
    assert decode["pdq_prompt_tokens_total"] == 0
