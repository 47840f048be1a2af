"""Every number of a body at its extremes: a 400 that names the field, or an answer of the engine."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from common.engine import Engine
from gateway.app import create_app
from gateway.schemas import ChatBody, CompletionBody
from tests.support.engines import poisoned_engine
from tests.support.fake_cluster import FakeCluster
from tests.support.gateway_server import make_service

JSON = {"content-type": "application/json"}
EXTREMES = [
    "1e-300",
    "5e-324",
    "1e-45",
    "1e-38",
    "1e-10",
    "1e308",
    "-1e308",
    "1e39",
    "1e999",
    "-1e-300",
    "-0.0",
    "0",
    "0.0",
    "1",
    "-1",
    "-2",
    "1.5",
    "NaN",
    "Infinity",
    "-Infinity",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551615",
    "18446744073709551616",
    "1" * 400,
    "true",
    "false",
    '"1"',
    '""',
    "[]",
    "{}",
    "[1]",
]
LISTS = ("stop_token_ids", "allowed_token_ids", "logit_bias", "prompt")


def numbers(kind: Any) -> Iterator[str]:
    """The fields of a body that take a number."""
    for name, field in kind.model_fields.items():
        found = field.annotation
        options = typing.get_args(found) if isinstance(found, types.UnionType) else (found,)
        bare = {typing.get_args(o)[0] if typing.get_origin(o) is typing.Annotated else o for o in options}
        if bare & {int, float}:
            yield name


@pytest.fixture(scope="module")
def engine() -> Engine:
    return poisoned_engine()


async def check(engine: Engine, field: str, texts: list[str]) -> None:
    """Send a body with each of `texts`; what is dispatched must be computable."""
    cluster = FakeCluster()
    cluster.add("u1")
    service = make_service(cluster)
    transport = httpx.ASGITransport(create_app(service))
    body = '{"model": "stories", "prompt": "Once", "seed": 1'
    if field != "max_tokens":
        body += ', "max_tokens": 3'
    computed = set()
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        for text in texts:
            cluster.dispatched.clear()
            data = f'{body}, "{field}": {text}}}'
            answer = await http.post("/v1/completions", content=data, headers=JSON)
            if answer.status_code == 400:
                param = answer.json()["error"]["param"]
                assert param.partition(".")[0] == field, (field, text, answer.text)
                continue
            assert answer.status_code == 200, (field, text, answer.text)
            ((_, dispatch), *_) = cluster.dispatched
            params = dispatch.request.params
            short = dataclasses.replace(params, max_tokens=3, min_tokens=min(params.min_tokens, 3))
            if (dispatch.request.token_ids, short) not in computed:
                computed.add((dispatch.request.token_ids, short))
                (completion,) = engine.generate([list(dispatch.request.token_ids)], short)
                assert completion.token_ids
    service.intake.close()


@pytest.mark.parametrize("field", sorted(numbers(CompletionBody)))
async def test_a_number_at_its_extremes_is_answered_or_named(engine: Engine, field: str) -> None:
    await check(engine, field, EXTREMES)


@pytest.mark.parametrize("field", LISTS)
async def test_a_number_in_a_list_at_its_extremes_is_answered_or_named(engine: Engine, field: str) -> None:
    if field != "logit_bias":
        await check(engine, field, [f"[{text}]" for text in EXTREMES])
        return
    await check(engine, field, [f'{{"5": {text}}}' for text in EXTREMES])
    keys = ("-1", "1e3", "9223372036854775808", " 5", "５", "", "005", "1" * 5000)
    await check(engine, field, [f"{{{json.dumps(key)}: 1}}" for key in keys])


async def test_numbers_of_a_chat_are_named_as_the_client_spelled_them() -> None:
    cluster = FakeCluster(lambda dispatch, choice: [5, 151645])
    cluster.add("u1", max_model_len=32768, total_blocks=4096)
    service = make_service(cluster, "tokenizers/qwen2")
    transport = httpx.ASGITransport(create_app(service))
    body = '{"messages": [{"role": "user", "content": "Once upon a time there was"}], "seed": 1'
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        for field in ("max_tokens", *sorted({*numbers(ChatBody)} - {*numbers(CompletionBody)})):
            for text in EXTREMES:
                data = f'{body}, "{field}": {text}}}'
                if field in ("max_tokens", "max_completion_tokens") and text == "1":
                    continue
                answer = await http.post("/v1/chat/completions", content=data, headers=JSON)
                if answer.status_code != 200:
                    assert answer.status_code == 400, (field, text[:40], answer.text)
                    assert answer.json()["error"]["param"] == field, (field, text[:40])
        data = f'{body}, "top_k": {"1" * 5000}}}'
        answer = await http.post("/v1/chat/completions", content=data, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    service.intake.close()
