"""Which fields of a `config.json` the decoder reads, which change nothing, which it must refuse.

Owns the three lists. Many checkpoints say "llama" and compute something else: Granite's multipliers,
Cohere's logit scale, layers without rotation, mixtures of experts. Such a field is refused by its
name unless its value is the one that means what we compute. A field that stands in no list belongs
to somebody's tools, as a rule; it is shown at start, and what it may have changed in the weights is
found by their names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import UnsupportedModel

READ = frozenset(
    {
        "model_type",
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "eos_token_id",
        "text_config",
    }
)

# Of training, of generation by other means, and notes; transformers' layers read none of them.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "embd_pdrop",
        "experts_implementation",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_length",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "vision_config",
    }
)

# Neutral are null, false, zero and empty.
OFF = frozenset(
    {
        "add_cross_attention",
        "add_unit_offset",
        "alibi",
        "apply_residual_connection_post_layernorm",
        "attention_chunk_size",
        "attn_logit_softcapping",
        "attn_logits_soft_cap",
        "attn_temperature_tuning",
        "block_configs",
        "cla_share_factor",
        "clip_qkv",
        "compression_config",
        "cross_attention_layers",
        "cross_layer_attention",
        "final_logit_softcapping",
        "first_k_dense_replace",
        "global_attn_every_n_layers",
        "interleaved_sliding_window",
        "is_encoder_decoder",
        "kv_lora_rank",
        "layers_config",
        "mamba_d_state",
        "moe_intermediate_size",
        "moe_num_experts",
        "mup_enabled",
        "multi_query",
        "n_routed_experts",
        "new_decoder_architecture",
        "no_rope_layer_interval",
        "num_experts",
        "num_kv_shared_layers",
        "num_local_experts",
        "parallel_attn",
        "per_layer_config",
        "post_norm",
        "q_lora_rank",
        "qk_layernorm",
        "qk_rope_head_dim",
        "quantization",
        "quantization_config",
        "rope_interleave",
        "rope_interleaved",
        "sandwich_norm",
        "scale_attention_by_inverse_layer_idx",
        "scale_embedding",
        "sliding_window_pattern",
        "softcap",
        "sparse_attention",
        "sub_norm",
        "transformers_weights",
        "use_alibi",
        "use_attention_sink",
        "use_bidirectional_attention",
        "use_mup",
        "use_parallel_block",
        "use_parallel_residual",
        "use_post_norm",
        "use_qkv_norm",
        "v_head_dim",
        "window_attn_skip_freq",
        "zero_centered_gamma",
    }
)

# Neutral are null and one.
ONE = frozenset(
    {
        "attn_scale",
        "depth_scale",
        "embedding_multiplier",
        "embedding_scale",
        "head_multiplier",
        "lm_head_multiplier",
        "logit_scale",
        "logits_scale",
        "logits_scaling",
        "output_multiplier_scale",
        "pretraining_tp",
        "residual_multiplier",
        "residual_scale",
        "rotary_pct",
        "scale_depth",
        "scale_emb",
        "width_scale",
    }
)


def _neutral(hidden_size: int, head_dim: int, qk_norm: bool) -> dict[str, tuple[Any, ...]]:
    """The values of other fields that mean what we compute."""
    return {
        "hidden_act": (None, "silu", "swish"),
        "hidden_activation": (None, "silu", "swish"),
        "is_causal": (None, True),
        "use_qk_norm": (None, qk_norm),
        "qk_norm": (None, qk_norm),
        "position_embedding_type": (None, "rope", "rotary"),
        "norm_type": (None, "rms", "rmsnorm", "rms_norm", "RMSNorm"),
        "layer_norm_type": (None, "rms", "rmsnorm", "rms_norm", "RMSNorm"),
        "rotary_dim": (None, head_dim),
        "query_pre_attn_scalar": (None, head_dim),
        "attention_multiplier": (None, head_dim**-0.5),
        "dim_model_base": (None, hidden_size),
    }


def check_fields(config: Mapping[str, Any], *, hidden_size: int, head_dim: int, qk_norm: bool) -> None:
    """Raise `UnsupportedModel` for the first field that asks for what the decoder does not do."""
    neutral = _neutral(hidden_size, head_dim, qk_norm)
    for field, value in config.items():
        allowed = (
            value in neutral[field]
            if field in neutral
            else not value
            if field in OFF
            else value in (None, 1)
            if field in ONE
            else True
        )
        if not allowed:
            raise UnsupportedModel(f"config.json: {field} = {value!r:.100} is not supported", param=field)
    no_rope = config.get("no_rope_layers")  # SmolLM3: 1 where a layer does rotate
    if no_rope and not (isinstance(no_rope, list) and all(no_rope)):
        raise UnsupportedModel(
            "config.json: no_rope_layers names layers without rotation, which is not supported",
            param="no_rope_layers",
        )


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields of no list that say something, in the order of the file."""
    known = READ | HARMLESS | OFF | ONE | {"no_rope_layers"} | _neutral(1, 1, False).keys()
    return [
        field
        for field, value in config.items()
        if field not in known and value not in (None, False) and not field.startswith("_")
    ]
