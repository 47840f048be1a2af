"""One description per model: what its files say together, and which of them holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, ModelError, UnsupportedModel
from common.model_folder.description import describe_model
from common.model_folder.generation import SamplingDefaults
from tests.support.checkpoints import SHARED_MODELS, STORIES
from tests.support.model_folders import described, write

QWEN = SHARED_MODELS / "tokenizers" / "qwen2"
LLAMA = {"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 512}


def test_a_whole_folder_is_described() -> None:
    model = describe_model(STORIES)
    assert (model.context_length, model.vocab_size) == (512, 512)
    assert model.stop_token_ids == (2, 1)
    assert dict(model.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_folder_of_a_tokenizer_alone_is_described_too() -> None:
    model = describe_model(QWEN)
    assert (model.context_length, model.vocab_size) == (32768, 151646)
    assert model.stop_token_ids == (151645,)
    assert list(model.chat_templates) == ["default"]


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    model = describe_model(tmp_path)
    assert (model.context_length, model.vocab_size, model.stop_token_ids) == (None, 0, ())
    assert model.tokenizer is None
    assert model.tokenizer_digest == ""


def test_the_text_part_of_a_model_with_several_counts(tmp_path: Path) -> None:
    nested = {
        "text_config": {"vocab_size": 600, "max_position_embeddings": 64, "eos_token_id": [7]},
        "vocab_size": 10,
        "eos_token_id": 5,
    }
    model = described(tmp_path, config_json=nested)
    assert (model.vocab_size, model.context_length) == (600, 64)
    assert set(model.stop_token_ids) == {5, 7, *described(tmp_path).stop_token_ids}


# ── Context ──────────────────────────────────────────────────────────────────────────────────────

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 2048),
        ({"rope_parameters": YARN}, 2048),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 256}}, 1024),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, 1024),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, 512),
        ({"rope_scaling": YARN | {"factor": None}, "original_max_position_embeddings": 128}, 512),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 512),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            512,
        ),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, 2048),
        ({"rope_parameters": YARN, "rope_scaling": {}}, 2048),
        ({"rope_parameters": YARN, "rope_scaling": None}, 2048),
        ({"rope_parameters": YARN, "rope_scaling": {"type": "default"}}, 512),
    ],
)
def test_the_context_is_as_long_as_the_rope_reaches(
    tmp_path: Path, fields: dict[str, Any], length: int
) -> None:
    assert described(tmp_path, config_json=LLAMA | fields).context_length == length


def test_where_config_is_silent_the_family_speaks_and_then_the_tokenizer(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "vocab_size": 512}
    assert described(tmp_path, config_json=config).context_length == 131_072
    assert (
        described(tmp_path, config_json={}, tokenizer_config_json={"model_max_length": 100}).context_length
        == 100
    )
    assert described(tmp_path, tokenizer_config_json={"model_max_length": 1e30}).context_length is None


# ── Stop ids ─────────────────────────────────────────────────────────────────────────────────────


def test_a_sequence_ends_at_every_id_that_some_file_names(tmp_path: Path) -> None:
    """A fine-tune for ChatML that kept the base model's id in `config.json`."""
    model = described(
        tmp_path,
        tokenizer=QWEN,
        config_json=LLAMA | {"vocab_size": 151936, "eos_token_id": 151643},
        generation_config_json={"eos_token_id": [151643, 5]},
        tokenizer_config_json={"eos_token": "<|im_end|>"},
    )
    assert model.stop_token_ids == (151643, 5, 151645)


@pytest.mark.parametrize("generation", [{}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_null_says_nothing_about_where_to_stop(tmp_path: Path, generation: dict[str, Any]) -> None:
    model = described(
        tmp_path,
        config_json=LLAMA | {"eos_token_id": 5},
        generation_config_json=generation,
        tokenizer_config_json={"eos_token": None},
    )
    assert model.stop_token_ids == (5,)


@pytest.mark.parametrize("value", ["</s>", True, -1, 512, [1, "2"], {"id": 2}, 2.0])
def test_a_stop_id_that_is_none_is_an_error_naming_the_field(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json: eos_token_id") as caught:
        described(tmp_path, config_json=LLAMA, generation_config_json={"eos_token_id": value})
    assert caught.value.param == "eos_token_id"


# ── Defaults for sampling ────────────────────────────────────────────────────────────────────────


def test_what_requests_get_that_say_nothing(tmp_path: Path) -> None:
    generation = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "max_new_tokens": 77,
        "transformers_version": "4.51.0",
    }
    model = described(tmp_path, config_json=LLAMA, generation_config_json=generation)
    assert model.sampling_defaults == SamplingDefaults(0.6, 0.95, 20, 0.1, 1.05, 77)
    nothing = dict.fromkeys(generation)
    model = described(tmp_path, config_json=LLAMA, generation_config_json=nothing)
    assert model.sampling_defaults == SamplingDefaults()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", True),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**12),
        ("temperature", 10**400),
    ],
)
def test_a_default_that_no_request_could_have_is_an_error(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=rf"generation_config\.json: {field}") as caught:
        described(tmp_path, config_json=LLAMA, generation_config_json={field: value})
    assert caught.value.param == field


def test_defaults_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    generation = {"temperature": -1.0, "max_new_tokens": "many", "eos_token_id": 5}
    write(tmp_path, config_json=LLAMA, generation_config_json=generation)
    model = describe_model(tmp_path, with_sampling_defaults=False)
    assert model.sampling_defaults == SamplingDefaults()
    assert model.stop_token_ids == (5,)


# ── Chat templates ───────────────────────────────────────────────────────────────────────────────


def test_templates_are_found_wherever_they_stand(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    files: dict[str, Any] = {"tokenizer_config_json": {"chat_template": several}}
    assert described(tmp_path, **files).chat_templates == {"default": "list", "tool_use": "tools"}
    files["chat_template_json"] = {"chat_template": "json"}
    assert described(tmp_path, **files).chat_templates["default"] == "json"
    files["chat_template_jinja"] = "jinja"
    assert described(tmp_path, **files).chat_templates["default"] == "jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert describe_model(tmp_path).chat_templates == {"default": "jinja", "tool_use": "tools", "rag": "rag"}


@pytest.mark.parametrize("value", [5, [5], [{"name": "x"}], {"default": 1}, [["a", "b"]]])
def test_a_template_that_is_no_text_is_an_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json: chat_template"):
        described(tmp_path, tokenizer_config_json={"chat_template": value})


def test_a_template_is_no_way_to_other_files_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="out of the model's folder"):
        describe_model(folder)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("of the hub")
    (snapshot / "chat_template.jinja").symlink_to(Path("../../blobs/1"))
    assert describe_model(snapshot).chat_templates == {"default": "of the hub"}


# ── Broken files ─────────────────────────────────────────────────────────────────────────────────

JSON_FILES = [
    "config",
    "generation_config",
    "tokenizer_config",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "tokenizer",
]
BROKEN = {
    "nothing": b"",
    "half": b"{",
    "a list": b"[]",
    "text": b'"x"',
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b'{"a": ' + b"[" * 100_000,
    "twice": b'{"eos_token_id": 1, "eos_token_id": 2}',
    "a long number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "half a surrogate pair": b'{"eos_token": "a\\uD83D"}',
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_broken_file_is_one_error_that_names_it(tmp_path: Path, name: str, broken: str) -> None:
    if name != "tokenizer":
        (tmp_path / "tokenizer.json").write_bytes((STORIES / "tokenizer.json").read_bytes())
    path = tmp_path / f"{name}.json"
    path.write_bytes(BROKEN[broken])
    with pytest.raises(ModelError) as caught:
        describe_model(tmp_path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_key_that_stands_twice_is_found_among_many(tmp_path: Path) -> None:
    """With a search of all keys for each of them this takes half an hour."""
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    write(tmp_path, vocab_json=f'{{{keys},"299999":0}}', merges_txt="")
    with pytest.raises(CheckpointError, match=r"vocab\.json .* the key '299999' stands twice"):
        describe_model(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(LLAMA)
    assert described(tmp_path, config_json=text).context_length == 512


@pytest.mark.parametrize("kind", ["dangling", "circle", "folder", "device", "huge"])
def test_a_file_that_is_none_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse
    else:
        path.symlink_to({"dangling": "absent", "circle": "config.json"}.get(kind, "/dev/zero"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe_model(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"vocab_size": "512"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"max_position_embeddings": 1e3}, "max_position_embeddings"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"text_config": [1]}, "text_config"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"full_attention": {}}}, "rope_scaling"),
        ({"rope_scaling": {"type": "proportional"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "rope_parameters.factor"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"original_max_position_embeddings": 0, "rope_scaling": YARN}, "original_max_position_embeddings"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        described(tmp_path, config_json=LLAMA | fields)
    assert caught.value.param == param
    assert "config.json" in str(caught.value)
