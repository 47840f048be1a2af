"""What a checkpoint's `config.json` says, as one parametric decoder of the Llama family.

Owns the mapping from Hugging Face's field names (old and new spellings) to `ModelConfig`, and the
refusal of everything that we would otherwise compute wrongly. Knows nothing of weights or torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.errors import UnsupportedModel
from common.model_folder.config_fields import check_fields
from common.model_folder.description import MAX_POSITION_EMBEDDINGS
from common.model_folder.reading import integer, number, wrong
from common.model_folder.rope import RopeConfig, parse_rope

FILE = "config.json"
MAX_LAYERS = 4096
ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MODEL_TYPES = tuple(ARCHITECTURES)

# What transformers assumes where `config.json` is silent.
FAMILY_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the decoder. `windows[layer]` is the sliding window in tokens, 0 for full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str  # as stored: "float32", "bfloat16" or "float16"

    @property
    def num_parameters(self) -> int:
        """Weights of embedding, layers, norms and head; a tied head counts once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        output = self.num_heads * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = qkv + output + mlp + 2 * self.hidden_size
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        embedding = self.vocab_size * self.hidden_size
        return embedding + head + self.num_layers * layer + self.hidden_size

    @property
    def num_linear_parameters(self) -> int:
        """Weights that every token is multiplied with: layers and head, without the embedding."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        output = self.num_heads * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (qkv + output + mlp) + self.vocab_size * self.hidden_size


def parse_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` from the content of `config.json`. Raises `UnsupportedModel` naming the field
    for what this decoder does not compute."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModel(
            f"{FILE}: model_type {model_type!r:.60} is not one of {', '.join(MODEL_TYPES)}",
            param="model_type",
        )
    config = {**FAMILY_DEFAULTS[model_type], **config}
    _check_architecture(config, model_type)
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    num_layers = _positive(config, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise wrong(FILE, "num_hidden_layers", f"at most {MAX_LAYERS}", num_layers)
    head_dim = _positive(config, "head_dim", hidden_size // num_heads)
    qk_norm = model_type == "qwen3"
    check_fields(config, hidden_size=hidden_size, head_dim=head_dim, qk_norm=qk_norm)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"{FILE}: {num_heads} attention heads do not divide among {num_kv_heads} key-value heads",
            param="num_key_value_heads",
        )
    vocab_size = _positive(config, "vocab_size")
    attention_bias = model_type in ("llama", "qwen3") and _flag(config, "attention_bias")
    if head_dim % 2:
        raise UnsupportedModel(f"{FILE}: a head of {head_dim} cannot be rotated", param="head_dim")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_epsilon(config),
        rope=parse_rope(
            config, _positive(config, "max_position_embeddings", MAX_POSITION_EMBEDDINGS[model_type])
        ),
        windows=_windows(config, model_type, num_layers),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and _flag(config, "mlp_bias"),
        qk_norm=qk_norm,
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _check_architecture(config: Mapping[str, Any], model_type: str) -> None:
    """The class that wrote a checkpoint says more than its `model_type`, which variants keep."""
    named = config.get("architectures")
    if named is None or named == []:
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise wrong(FILE, "architectures", "a list of names", named)
    # Early conversions of the first Llama wrote their own spelling.
    if ARCHITECTURES[model_type].lower() not in [name.lower() for name in named]:
        raise UnsupportedModel(
            f"{FILE}: architectures {', '.join(named):.200} of model_type {model_type} is not "
            f"supported, only {ARCHITECTURES[model_type]}",
            param="architectures",
        )


def _positive(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = integer(config, field, FILE)
    value = default if value is None else value
    if value is None or value < 1:
        raise wrong(FILE, field, "a positive integer", value)
    return value


def _epsilon(config: Mapping[str, Any]) -> float:
    value = number(config, "rms_norm_eps", FILE)
    if value is not None and value <= 0:
        raise wrong(FILE, "rms_norm_eps", "a positive number", value)
    return 1e-6 if value is None else value


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise wrong(FILE, field, "true or false", value)
    return bool(value)


def _windows(config: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int, ...]:
    if model_type == "llama":
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise UnsupportedModel(
                f"{FILE}: layer_types with windows are not supported for llama", param="layer_types"
            )
        return (0,) * num_layers
    window = integer(config, "sliding_window", FILE)
    if window is None:
        return (0,) * num_layers
    if model_type != "mistral" and not _flag(config, "use_sliding_window"):
        return (0,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = integer(config, "max_window_layers", FILE, least=0) or 0
        return tuple(0 if layer < first else window for layer in range(num_layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(not isinstance(k, str) or k not in known for k in layer_types)
    ):
        raise UnsupportedModel(
            f"{FILE}: layer_types must name {num_layers} layers as full_attention or sliding_attention",
            param="layer_types",
        )
    return tuple(known[kind] for kind in layer_types)
