"""What a model's folder says reaches the requests of a gateway: defaults, context, vocabulary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import ConfigError, UnsupportedModel
from common.identity import ModelIdentity
from common.sampling import SamplingParams
from common.settings.config import GatewaySettings
from gateway.served_models import load_models
from tests.support.checkpoints import STORIES
from tests.support.fake_cluster import FINGERPRINT, FakeCluster
from tests.support.gateway_server import serving
from tests.support.model_folders import write

MODEL = ModelIdentity("tuned", "main", "letters")
GENERATION = {
    "do_sample": False,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "max_new_tokens": 9,
}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small files of the stories model, with defaults and a template of its own."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((STORIES / name).read_bytes())
    return write(tmp_path, generation_config_json=GENERATION, chat_template_jinja=CHAT)


@contextlib.asynccontextmanager
async def gateway_of(folder: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FakeCluster]]:
    (model,) = load_models(GatewaySettings(model=str(folder), **settings))
    cluster = FakeCluster()
    fingerprint = dataclasses.replace(FINGERPRINT, model=MODEL.name)
    cluster.add("node", fingerprint=fingerprint, max_model_len=4096)
    further = (dataclasses.replace(model, identity=MODEL),)
    async with serving(cluster, further=further) as served, httpx.AsyncClient(base_url=served.url) as client:
        yield client, cluster


async def params_of(client: httpx.AsyncClient, cluster: FakeCluster, **body: Any) -> SamplingParams:
    """What a chat, or a completion where there is a prompt, has asked the nodes for."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    chat = {} if "prompt" in body else {"messages": [{"role": "user", "content": "Once upon"}]}
    reply = await client.post(path, json={"model": "tuned", **chat, **body})
    assert reply.status_code == 200, reply.text
    return cluster.dispatched[-1][1].request.params


def chosen(params: SamplingParams) -> tuple[float, ...]:
    return (
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.repetition_penalty,
        params.max_tokens,
    )


async def test_a_request_that_says_nothing_gets_the_models_defaults(folder: Path) -> None:
    async with gateway_of(folder) as (client, cluster):
        assert chosen(await params_of(client, cluster)) == (0.6, 0.95, 20, 0.05, 1.05, 9)
        nothing = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "max_tokens"))
        assert chosen(await params_of(client, cluster, **nothing)) == (0.6, 0.95, 20, 0.05, 1.05, 9)
        assert (await params_of(client, cluster, prompt="Once")).max_tokens == 9


async def test_what_a_request_says_holds(folder: Path) -> None:
    said = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 12}
    async with gateway_of(folder) as (client, cluster):
        assert chosen(await params_of(client, cluster, **said)) == (0, 1, 0, 0, 1, 12)


async def test_generation_config_none_gives_the_defaults_of_the_api(folder: Path) -> None:
    async with gateway_of(folder, generation_config="none") as (client, cluster):
        assert chosen(await params_of(client, cluster))[:5] == (1.0, 1.0, 0, 0.0, 1.0)
        assert (await params_of(client, cluster)).max_tokens > 100
        assert (await params_of(client, cluster, prompt="Once")).max_tokens == 16


def test_generation_config_none_does_not_mind_defaults_that_are_none(folder: Path) -> None:
    write(folder, generation_config_json={"temperature": -1, "eos_token_id": 7})
    with pytest.raises(UnsupportedModel, match="temperature"):
        load_models(GatewaySettings(model=str(folder)))
    (model,) = load_models(GatewaySettings(model=str(folder), generation_config="none"))
    assert 7 in model.tokenizer.model.stop_token_ids


async def test_completions_have_openais_default_length_at_most(folder: Path) -> None:
    write(folder, generation_config_json={"max_new_tokens": 100})
    async with gateway_of(folder) as (client, cluster):
        assert (await params_of(client, cluster, prompt="Once")).max_tokens == 16
        assert (await params_of(client, cluster)).max_tokens == 100


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ({}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 100}, 100),
    ],
)
async def test_the_context_that_clients_see_follows_the_rope(
    folder: Path, overrides: dict[str, Any], length: int
) -> None:
    async with gateway_of(folder, hf_overrides=json.dumps(overrides)) as (client, _):
        models = (await client.get("/v1/models")).json()["data"]
        assert {model["id"]: model["max_model_len"] for model in models}["tuned"] == length
        body = {"model": "tuned", "prompt": [5] * length, "max_tokens": 1}
        reply = await client.post("/v1/completions", json=body)
        assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("text", ["{", "[]", "5", "{" * 5000])
def test_overrides_that_are_no_object_are_an_error_at_start(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="hf_overrides"):
        load_models(GatewaySettings(model=str(folder), hf_overrides=text))


async def test_text_whose_token_the_model_has_no_row_for_is_a_bad_request(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    extra = {
        "content": "<far>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    content["added_tokens"].append({"id": 512, **extra})
    write(folder, tokenizer_json=content)
    async with gateway_of(folder) as (client, cluster):
        for path, body in (
            ("/v1/completions", {"prompt": "Once <far>"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<far>"}]}),
        ):
            reply = await client.post(path, json={"model": "tuned", **body})
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "token_out_of_range")
        assert cluster.dispatched == []


def test_overrides_make_another_revision() -> None:
    plain, longer, again = (
        load_models(GatewaySettings(model=str(STORIES), hf_overrides=text)).default.identity.revision
        for text in ("", '{"rope_theta": 5000.0}', '{ "rope_theta": 5000.0 }')
    )
    assert plain != longer
    assert longer == again
