"""Every field of a config is read, is known to change nothing, or is refused by its name."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from typing import Any

import pytest

from common.errors import UnsupportedModel
from common.model_folder.config_fields import HARMLESS, OFF, ONE, READ, unknown_fields
from common.model_folder.model_config import MODEL_TYPES, parse_model_config

CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def written_by_transformers(model_type: str) -> dict[str, Any]:
    """`config.json` of the family with every field, and the fields that it would leave out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = importlib.import_module("transformers")
        kind = getattr(transformers, f"{CLASSES[model_type]}Config")
        config: dict[str, Any] = kind(**CONFIG).to_dict()
    fields = {f.name: None for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    return {**fields, **config}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_field_that_transformers_has_is_overlooked(model_type: str) -> None:
    config = written_by_transformers(model_type)
    known = READ | HARMLESS | OFF | ONE | {"hidden_act"}
    assert not [field for field in config if field not in known and not field.startswith("_")]
    parse_model_config(config)


def test_no_field_stands_in_two_lists() -> None:
    lists = [READ, HARMLESS, OFF, ONE]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 2) for field in sorted(OFF | ONE)),
        ("hidden_act", "relu2"),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("is_causal", False),
        ("use_qk_norm", True),
        ("position_embedding_type", "alibi"),
        ("norm_type", "layernorm"),
        ("rotary_dim", 4),
        ("attention_multiplier", 0.0078125),
        ("query_pre_attn_scalar", 256),
        ("no_rope_layers", [1, 0]),
        ("quantization_config", {"bits": 4}),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("dim_model_base", 256),
    ],
)
def test_a_field_that_changes_the_computation_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=rf"config\.json: {field} ") as caught:
        parse_model_config({"model_type": "llama", **CONFIG, field: value})
    assert caught.value.param == field


def test_a_field_with_the_value_that_changes_nothing_is_taken() -> None:
    neutral: dict[str, Any] = dict.fromkeys(OFF, None) | dict.fromkeys(ONE, 1.0)
    neutral |= {"hidden_act": "silu", "is_causal": True, "no_rope_layers": [1, 1], "rotary_dim": 8}
    neutral |= {"clip_qkv": None, "quantization_config": {}, "attention_multiplier": 8**-0.5}
    plain = parse_model_config({"model_type": "llama", **CONFIG})
    assert parse_model_config({"model_type": "llama", **CONFIG, **neutral}) == plain


def test_fields_that_nobody_knows_are_shown() -> None:
    config = {"model_type": "llama", "my_trainer": "x", "odd": None, "_note": 1, "hidden_act": "silu"}
    assert unknown_fields(config) == ["my_trainer"]


def test_the_class_that_wrote_a_checkpoint_has_to_be_the_familys() -> None:
    for named in (None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["X", "LlamaForCausalLM"]):
        parse_model_config({"model_type": "llama", "architectures": named, **CONFIG})
    for named in (["LlamaModel"], ["LlamaForCausalLMEagle3"], ["Qwen2ForCausalLM"]):
        with pytest.raises(UnsupportedModel, match="architectures"):
            parse_model_config({"model_type": "llama", "architectures": named, **CONFIG})
