"""Several models behind one gateway: each request goes to nodes of its own model, or nowhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.engine import Engine
from common.errors import ConfigError
from common.identity import ModelIdentity
from common.model_files import model_revision
from common.settings.config import GatewaySettings, load
from gateway import served_models
from gateway.placement import DispatchLimits
from gateway.served_models import ServedModel, load_models
from tests.support.fake_cluster import FINGERPRINT, MODEL, FakeCluster
from tests.support.gateway_server import MODELS, Served, load_tokenizer, serving

LLAMA = ModelIdentity("llama", "other weights", "other letters")
LLAMA_PRINT = dataclasses.replace(
    FINGERPRINT, model="llama", revision=LLAMA.revision, tokenizer=LLAMA.tokenizer
)
PROMPT = "Once upon a time"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A gateway for `stories` and `llama`, and a node of each."""
    further = (ServedModel(LLAMA, load_tokenizer("babyllama361")),)
    cluster = FakeCluster()
    cluster.add("stories-node")
    cluster.add("llama-node", fingerprint=LLAMA_PRINT)
    limits = DispatchLimits(placement_timeout_s=0.05)
    async with serving(cluster, limits=limits, further=further) as running:
        yield running


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url) as client:
        yield client


async def ask(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, **body})
    return {"status": reply.status_code, **reply.json()}


async def test_a_request_goes_to_a_node_of_the_model_it_names(
    served: Served, http: httpx.AsyncClient
) -> None:
    for model, node in [("stories", "stories-node"), ("llama", "llama-node")] * 4:
        answer = await ask(http, model=model)
        assert (answer["status"], answer["model"]) == (200, model)
        where, dispatch = served.cluster.dispatched[-1]
        assert where == node
        tokenizer = served.service.models.find(model).tokenizer
        assert list(dispatch.request.token_ids) == tokenizer.encode_now(PROMPT)
        assert dispatch.request.model == served.service.models.find(model).identity


async def test_who_names_no_model_gets_the_first(served: Served, http: httpx.AsyncClient) -> None:
    assert (await ask(http))["model"] == "stories"


async def test_every_model_is_listed_and_can_be_looked_up(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["stories", "llama"]
    assert [model["max_model_len"] for model in listed] == [512, 256]
    assert (await http.get("/v1/models/llama")).json() == listed[1]


async def test_the_context_that_clients_see_is_the_longest_of_the_models_nodes(
    served: Served, http: httpx.AsyncClient
) -> None:
    """Nodes may be started with a shorter one than the model has; the model's is a limit."""

    async def shown() -> set[int]:
        (listed, *_) = (await http.get("/v1/models")).json()["data"]
        tokenized = await http.post("/tokenize", json={"model": "stories", "prompt": "a"})
        return {listed["max_model_len"], tokenized.json()["max_model_len"]}

    served.cluster.kill("stories-node")
    served.cluster.add("short", max_model_len=64)
    assert await shown() == {64}
    served.cluster.add("shorter", max_model_len=32)
    assert await shown() == {64}
    body = {"model": "stories", "prompt": [5] * 90, "max_tokens": 4, "truncate_prompt_tokens": -1}
    reply = await http.post("/v1/completions", json=body)
    assert reply.json()["usage"]["prompt_tokens"] == 60
    served.cluster.add("long", max_model_len=9999)
    assert await shown() == {512}


@pytest.mark.parametrize("name", ["gpt-5", "", "llama ", "x" * 100_000])
async def test_an_unknown_model_is_refused_with_the_names_there_are(
    http: httpx.AsyncClient, name: str
) -> None:
    answer = await ask(http, model=name)
    assert (answer["status"], answer["error"]["code"]) == (404, "model_not_found")
    assert answer["error"]["message"].endswith("'stories', 'llama' are")
    assert len(answer["error"]["message"]) < 500


async def test_tokens_are_those_of_the_model_named(http: httpx.AsyncClient) -> None:
    for model, tokenizer in (("stories", "stories260K"), ("llama", "babyllama361")):
        ids = load_tokenizer(tokenizer).encode_now(PROMPT)
        reply = (await http.post("/tokenize", json={"model": model, "prompt": PROMPT})).json()
        assert reply["tokens"] == ids
        body = {"model": model, "tokens": ids}
        assert (await http.post("/detokenize", json=body)).json()["prompt"].endswith(PROMPT)


@pytest.mark.parametrize("part", ["model", "revision", "tokenizer"])
async def test_a_node_of_another_model_gets_no_request(
    served: Served, http: httpx.AsyncClient, part: str
) -> None:
    """It is there, idle, and under the name that is asked for, unless the name is what differs."""
    cluster = served.cluster
    cluster.kill("stories-node")
    cluster.add("stranger", fingerprint=dataclasses.replace(FINGERPRINT, **{part: "strange"}))
    answer = await ask(http, model="stories")
    assert (answer["status"], answer["error"]["code"]) == (503, "service_unavailable")
    said = f"{part} is 'strange' there" if part != "model" else "nodes run 'llama', 'strange'"
    assert said in answer["error"]["message"]
    assert cluster.dispatched == []
    assert (await ask(http, model="llama"))["status"] == 200


async def test_the_gateway_is_ready_while_some_model_has_nodes(
    served: Served, http: httpx.AsyncClient
) -> None:
    served.cluster.kill("stories-node")
    assert (await http.get("/ready")).status_code == 200
    served.cluster.kill("llama-node")
    reply = await http.get("/ready")
    assert reply.status_code == 503
    assert "no node of 'stories' is here" in reply.json()["reason"]
    assert "no node of 'llama' is here" in reply.json()["reason"]


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_gateway_and_node_read_the_same_identity_from_the_same_folder(name: str) -> None:
    engine = Engine.load(MODELS / name, dtype="float32", num_kv_blocks=32)
    (served,) = load_models(GatewaySettings(model=str(MODELS / name)))
    assert served.identity.mismatch(engine.fingerprint) is None
    assert all(dataclasses.astuple(served.identity))


def test_copies_that_differ_in_weights_tokenizer_or_stop_ids_are_other_models(tmp_path: Path) -> None:
    def identity(change: Callable[[Path], object]) -> ModelIdentity:
        folder = tmp_path / change.__name__ / "copy"
        shutil.copytree(MODELS / "stories260K", folder)
        change(folder)
        return load_models(GatewaySettings(model=str(folder))).default.identity

    def same(folder: Path) -> None:
        """Written by another tool: the same content in another order and with other spaces."""
        path = folder / "tokenizer.json"
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps(dict(reversed(content.items())), indent=3))

    def other_weights(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def other_tokenizer(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_bytes())
        content["model"]["merges"].pop()
        path.write_text(json.dumps(content))

    def other_stop_ids(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "eos_token_id": [2, 7]}))

    def no_weights(folder: Path) -> None:
        (folder / "model.safetensors").unlink()

    original = identity(same)
    settings = GatewaySettings(model=str(MODELS / "stories260K"), served_model_name="copy")
    assert load_models(settings).default.identity == original
    for change, part in (
        (other_weights, "revision"),
        (other_tokenizer, "tokenizer"),
        (other_stop_ids, "tokenizer"),
    ):
        changed = identity(change)
        differing = {
            f for f in ("name", "revision", "tokenizer") if getattr(changed, f) != getattr(original, f)
        }
        assert differing == {part}, change.__name__
    assert identity(no_weights) == dataclasses.replace(original, revision="")


def test_a_snapshot_from_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(MODELS / "stories260K", snapshot)
    assert model_revision(snapshot) == snapshot.name
    (snapshot / "model.safetensors").unlink()  # what a gateway has of it
    assert model_revision(snapshot) == snapshot.name


def test_models_are_named_by_the_settings() -> None:
    stories = str(MODELS / "stories260K")
    loaded = load_models(
        GatewaySettings(model=stories, models=(str(MODELS / "babyllama361"), f"again={stories}"))
    )
    assert [model.name for model in loaded] == ["stories260K", "babyllama361", "again"]
    assert MODEL.name not in {model.name for model in loaded}


def test_a_further_model_may_have_overrides_as_its_nodes_have() -> None:
    stories, overrides = str(MODELS / "stories260K"), {"max_position_embeddings": 64}
    entry = json.dumps({"name": "short", "model": stories, "hf_overrides": overrides})
    settings = load(GatewaySettings, ["--models", f"a={stories},{entry},b={stories}"], {})
    models = {model.name: model for model in load_models(settings)}
    assert list(models)[1:] == ["a", "short", "b"]
    assert (models["a"].max_model_len, models["short"].max_model_len) == (512, 64)
    node = Engine.load(
        stories, num_kv_blocks=8, served_model_name="short", hf_overrides=json.dumps(overrides)
    )
    assert models["short"].identity.mismatch(node.fingerprint) is None
    assert models["a"].identity.mismatch(node.fingerprint) is not None


def test_a_further_model_may_be_of_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(model: str, revision: str) -> Path:
        asked.append((model, revision))
        return MODELS / "stories260K"

    monkeypatch.setattr(served_models, "resolve_model", resolve)
    load_models(GatewaySettings(models=('{"model": "org/x", "revision": "v2"}', "y=org/y")))
    assert asked == [("", ""), ("org/x", "v2"), ("org/y", "")]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{", "is not JSON"),
        ('{"name": "a"}', "names no model"),
        ('{"model": ""}', "names no model"),
        ('{"model": 5}', "'model' of .* is no str"),
        ('{"model": "x", "hf_overrides": "{}"}', "'hf_overrides' of .* is no dict"),
        ('{"model": "x", "dtype": "auto"}', "'dtype' of .* is unknown"),
        (str(MODELS / "stories260K"), "two models have the name 'stories260K'"),
        ("=", "'=' is not NAME=MODEL"),
        ("name=", "'name=' is not NAME=MODEL"),
        ("name=/no/such/folder", "model folder /no/such/folder does not exist"),
    ],
)
def test_a_model_that_cannot_be_meant_is_an_error_at_start(entry: str, said: str) -> None:
    settings = GatewaySettings(model=str(MODELS / "stories260K"), models=(entry,))
    with pytest.raises(ConfigError, match=said):
        load_models(settings)
