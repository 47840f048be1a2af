"""What a checkpoint's `config.json` says, as one parametric decoder of the Llama family.

Owns the mapping from Hugging Face's field names (old and new spellings) to `ModelConfig`, and the
refusal of everything that we would otherwise compute wrongly. Knows nothing of weights or torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, UnsupportedModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

# What transformers assumes where `config.json` is silent.
FAMILY_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequency, and how it is scaled (see rope.py for the formulas)."""

    theta: float = 10_000.0
    kind: str = "default"
    rotary_dim: int = 0  # how many of a head's dimensions rotate
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive parameter of the scaling; raises `UnsupportedModel` when it is none."""
        return _number(self.parameters, name, default, f"rope_parameters.{name}")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the decoder. `windows[layer]` is the sliding window in tokens, 0 for full attention."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    windows: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    stop_token_ids: tuple[int, ...]
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


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` and, if there is one, `generation_config.json` of a checkpoint folder.

    Raises `CheckpointError` for an absent or unreadable file, `UnsupportedModel` naming the field
    for what this decoder does not compute.
    """
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(config, generation)


def parse_model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """`ModelConfig` from the content of `config.json` and `generation_config.json`."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}", param="model_type"
        )
    config = {**FAMILY_DEFAULTS[model_type], **config}
    _refuse(config, "hidden_act", "silu", allowed=("silu", "swish", None))
    _refuse(config, "pretraining_tp", 1, allowed=(1, None))
    _refuse(config, "quantization_config", None, allowed=(None,))

    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    num_layers = _positive(config, "num_hidden_layers")
    head_dim = _positive(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"{num_heads} attention heads do not divide among {num_kv_heads} key-value heads",
            param="num_key_value_heads",
        )
    vocab_size = _positive(config, "vocab_size")
    attention_bias = model_type in ("llama", "qwen3") and _flag(config, "attention_bias")
    generation = generation or {}
    stop = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")), "eos_token_id")
    if any(token >= vocab_size for token in stop):
        raise UnsupportedModel(
            f"eos_token_id {max(stop)} is not in the vocabulary of {vocab_size}",
            param="eos_token_id",
        )
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        rope=_rope(config, head_dim),
        windows=_windows(config, model_type, num_layers),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and _flag(config, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        stop_token_ids=stop,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", param=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", param=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", param=str(path))
    return value


def _positive(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{field} must be a positive integer, got {value!r}", param=field)
    return value


def _number(
    config: Mapping[str, Any], name: str, default: float | None = None, param: str = ""
) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModel(
            f"{param or name} must be a positive number, got {value!r}", param=param or name
        )
    return float(value)


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value not in (None, True, False):
        raise UnsupportedModel(f"{field} must be true or false, got {value!r}", param=field)
    return bool(value)


def _refuse(config: Mapping[str, Any], field: str, default: Any, allowed: tuple[Any, ...]) -> None:
    value = config.get(field, default)
    if value not in allowed:
        raise UnsupportedModel(f"{field} = {value!r} is not supported", param=field)


def _token_ids(value: Any, field: str) -> tuple[int, ...]:
    """A stop id as `generation_config` gives it: absent, one integer, or a list of them."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise UnsupportedModel(
            f"{field} must be token ids of 0 or more, got {value!r}", param=field
        )
    return tuple(values)


def _windows(config: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window")
    if model_type == "llama" or window is None:
        return (0,) * num_layers
    window = _positive(config, "sliding_window")
    if model_type != "mistral" and not _flag(config, "use_sliding_window"):
        return (0,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", 0)
        if type(first) is not int:
            raise UnsupportedModel(
                f"max_window_layers must be an integer, got {first!r}", param="max_window_layers"
            )
        return tuple(0 if layer < first else window for layer in range(num_layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(not isinstance(k, str) or k not in known for k in layer_types)
    ):
        raise UnsupportedModel(
            f"layer_types must name {num_layers} layers as full_attention or sliding_attention",
            param="layer_types",
        )
    return tuple(known[kind] for kind in layer_types)


def _rope(config: dict[str, Any], head_dim: int) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5), `rope_scaling` + `rope_theta` (before)."""
    parameters: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        given = config.get(field) or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise UnsupportedModel(
                f"{field} must be one set of parameters for all layers, got {given!r}", param=field
            )
        parameters |= given
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"rope type {kind!r} is not one of {', '.join(ROPE_TYPES)}",
            param="rope_parameters.rope_type",
        )
    for given in (config, parameters):
        # None of these families turns a part of a head only; transformers ignores it or crashes.
        _refuse(given, "partial_rotary_factor", None, allowed=(None, 1))
    theta = _number(config | parameters, "rope_theta", 10_000.0)
    if theta <= 1.0:
        raise UnsupportedModel(f"rope_theta must be above 1, got {theta}", param="rope_theta")
    if head_dim % 2:
        raise UnsupportedModel(f"a head of {head_dim} cannot be rotated", param="head_dim")
    return RopeConfig(theta, kind, head_dim, parameters)
