"""A checkpoint that cannot be served is refused with an error that names file, tensor or field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine import Engine
from common.errors import CheckpointError, InsufficientMemory, ModelError, UnsupportedModel
from tests.support.checkpoints import STORIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the stories model to damage."""
    for path in STORIES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder: Path, error: type[ModelError]) -> ModelError:
    with pytest.raises(error) as raised:
        Engine.load(folder, num_kv_blocks=8)
    return raised.value


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(folder, CheckpointError).param == str(path)


def test_a_corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    assert refused(folder, CheckpointError).param == str(path)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in str(refused(folder, CheckpointError))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_no_file_are_not_waited_for(folder: Path, kind: str, sharded: bool) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    if sharded:
        index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        path = folder / "a.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "circle" else "/dev/zero")
    assert refused(folder, CheckpointError).param == str(path)


def test_a_missing_tensor(folder: Path) -> None:
    change_tensors(folder, **{"model.layers.3.mlp.up_proj.weight": None})
    assert refused(folder, CheckpointError).param == "model.layers.3.mlp.up_proj.weight"


def test_a_misshapen_tensor(folder: Path) -> None:
    change_tensors(folder, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 63)})
    error = refused(folder, CheckpointError)
    assert error.param == "model.layers.0.self_attn.k_proj.weight"
    assert "[32, 63]" in str(error)
    assert "[32, 64]" in str(error)


def test_a_tensor_of_integers(folder: Path) -> None:
    change_tensors(folder, **{"model.norm.weight": torch.zeros(64, dtype=torch.int32)})
    assert refused(folder, CheckpointError).param == "model.norm.weight"


def test_a_tensor_with_nan(folder: Path) -> None:
    change_tensors(folder, **{"model.norm.weight": torch.full((64,), float("nan"))})
    assert refused(folder, CheckpointError).param == "model.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",  # another way of attention
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.down_proj.weight_scale",  # BitNet, quantization
        "model.layers.0.self_attn.attn_sub_norm.weight",
        "model.layers.5.mlp.up_proj.weight",  # a layer too many
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_no_layer_takes(folder: Path, name: str) -> None:
    change_tensors(folder, **{name: torch.ones(8)})
    error = refused(folder, CheckpointError)
    assert error.param == name
    assert name in str(error)


def test_positions_that_no_memory_can_hold_are_refused_before_anything_is_read(folder: Path) -> None:
    change_config(folder, max_position_embeddings=2**31 - 1, head_dim=256, num_attention_heads=8)
    with pytest.raises(InsufficientMemory, match="max-model-len"):
        Engine.load(folder, num_kv_blocks=8)


def test_buffers_that_follow_from_the_config_are_no_fault(folder: Path) -> None:
    names = ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    change_tensors(folder, **{f"model.{name}": torch.ones(4) for name in names})
    Engine.load(folder, num_kv_blocks=8)


def test_one_file_holds_beside_an_index_as_in_transformers(folder: Path) -> None:
    """Somebody has merged the shards, or trained on, and the index stayed."""
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Engine.load(folder, num_kv_blocks=8)


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in str(refused(folder, CheckpointError).param)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../../x"}}',
        '{"weight_map": {"a": "x\\u0000y"}}',
        '{"weight_map": {"a": "x\\u0000.safetensors"}}',
        '{"weight_map": {"a": "' + "x" * 300 + '.safetensors"}}',
    ],
)
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    path.write_text(text)
    error = refused(folder, CheckpointError)
    assert "index" in str(error)
    assert error.param == str(path)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": "absent"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"architectures": ["BitnetForCausalLM"]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**70}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": "five"}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "x"}}, "rope_parameters.factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_scaling"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1e300}},
            "rope_parameters.beta_fast",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": -1}},
            "rope_parameters.attention_factor",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope_parameters.low_freq_factor",
        ),
        ({"rope_scaling": ["linear"]}, "rope_scaling"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 6}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": -4}, "sliding_window"),
        ({"model_type": "mistral", "architectures": [], "layer_types": 3}, "layer_types"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, 512]}, "eos_token_id"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types"),
    ],
)
def test_a_field_that_is_not_supported(folder: Path, fields: dict[str, Any], param: str) -> None:
    (folder / "generation_config.json").unlink()
    change_config(folder, **fields)
    assert refused(folder, UnsupportedModel).param == param


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '"x"', "\xff"])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "config.json") == refused(folder, CheckpointError).param


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in str(refused(folder, CheckpointError))
