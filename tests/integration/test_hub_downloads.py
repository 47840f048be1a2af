"""Of a model from the hub come the files that a process needs, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.engine import Engine
from common.errors import CheckpointError, ConfigError, UnsupportedModel
from common.model_files import resolve_model
from common.settings.config import GatewaySettings
from gateway.served_models import load_models
from tests.support.checkpoints import STORIES, save_random_model
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.model_folders import write

NAME = "org/model"
SMALL = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
WEIGHTS = "model-0000{}-of-00002.safetensors"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A sharded checkpoint, and beside it what repositories have besides."""
    folder = save_random_model(
        tmp_path / "repository",
        "llama",
        5,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        max_shard_size="140KB",
    )
    (folder / "tokenizer.json").write_bytes((STORIES / "tokenizer.json").read_bytes())
    (folder / "original").mkdir()
    (folder / "onnx").mkdir()
    for name in (
        "consolidated.safetensors",
        "original/params.json",
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "onnx/config.json",
        "README.md",
        "model.fp16.safetensors",
        "trainer_state.json",
    ):
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub({NAME: repository}).running() as running:
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


def shards(repository: Path) -> set[str]:
    index = json.loads((repository / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) > 1
    return names


def change_config(repository: Path, **fields: Any) -> None:
    path = repository / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_gateway_fetches_small_files_only(hub: FakeHub) -> None:
    (model,) = load_models(GatewaySettings(model=NAME))
    assert set(hub.fetched) == SMALL
    assert (model.name, model.identity.revision) == (NAME, COMMIT)


def test_a_node_fetches_the_weights_that_the_index_names(hub: FakeHub, repository: Path) -> None:
    engine = Engine.load(NAME, num_kv_blocks=8)
    assert set(hub.fetched) == SMALL | shards(repository)
    assert engine.fingerprint.revision == COMMIT


def test_one_file_is_fetched_where_there_are_shards_too(hub: FakeHub, repository: Path) -> None:
    merged = {}
    for name in shards(repository):
        merged |= load_file(repository / name)
    save_file(merged, repository / "model.safetensors", {"format": "pt"})
    Engine.load(NAME, num_kv_blocks=8)
    assert set(hub.fetched) == SMALL | {"model.safetensors"}


def test_what_is_here_is_not_fetched_again(hub: FakeHub) -> None:
    folder = resolve_model(NAME, weights=True)
    hub.fetched.clear()
    assert resolve_model(NAME, weights=True) == folder
    assert resolve_model(NAME) == folder
    assert hub.fetched == []


def test_random_weights_are_not_fetched(hub: FakeHub) -> None:
    Engine.load(NAME, num_kv_blocks=8, load_format="dummy")
    assert set(hub.fetched) == SMALL


@pytest.mark.parametrize(
    "fields", [{"model_type": "gpt2"}, {"architectures": ["OtherForCausalLM"]}, {"hidden_act": "relu2"}]
)
def test_a_model_that_cannot_run_is_refused_before_its_weights_come(
    hub: FakeHub, repository: Path, fields: dict[str, Any]
) -> None:
    change_config(repository, **fields)
    with pytest.raises(UnsupportedModel):
        Engine.load(NAME, num_kv_blocks=8)
    assert set(hub.fetched) == SMALL


def remove_shard(repository: Path) -> None:
    (repository / sorted(shards(repository))[0]).unlink()


def only_pickles(repository: Path) -> None:
    for name in ("model.safetensors.index.json", *shards(repository)):
        (repository / name).unlink()


@pytest.mark.parametrize("change", [remove_shard, only_pickles])
def test_weights_that_are_missing_are_named(
    hub: FakeHub, repository: Path, change: Callable[[Path], None]
) -> None:
    change(repository)
    with pytest.raises(CheckpointError, match=r"org/model has no model.*\.safetensors on the hub"):
        resolve_model(NAME, weights=True)


def test_an_index_cannot_name_files_elsewhere(hub: FakeHub, repository: Path) -> None:
    write(repository, **{"model.safetensors.index_json": {"weight_map": {"a": "original/x.pth"}}})
    with pytest.raises(CheckpointError, match="none of the checkpoint's"):
        resolve_model(NAME, weights=True)


@pytest.mark.parametrize("name", ["org/absent", "../x", "a/b/c", "/no/such", "org/na me"])
def test_a_model_that_is_nowhere_is_one_clear_line(hub: FakeHub, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
