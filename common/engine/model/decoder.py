"""One parametric decoder of the Llama family, written against `Backend` alone.

Owns the layers, their order, and the names their tensors have in a checkpoint. Covers Llama,
Mistral, Qwen2 and Qwen3: grouped-query attention, biases, q/k norm, sliding windows, scaled
rotation, tied heads. Knows nothing of devices, blocks or scheduling.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.device import Backend, HeadShape, Linear
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import Rows
from common.engine.model.rope import rope_table
from common.engine.model.weights import TensorSource
from common.model_folder.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights, prepared for the backend."""

    shape: HeadShape
    input_norm: Tensor
    qkv: Linear
    head_norms: tuple[Tensor, Tensor] | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Model:
    """Token ids in, hidden states and logits out; keys and values go to the KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        source: TensorSource,
        max_model_len: int,
        first_layer: int = 0,
    ) -> None:
        """Load all weights. `first_layer` is the number that the pool's layout gives to layer 0. Raises
        `CheckpointError` before anything is prepared if a tensor is missing or misshapen."""
        self.config = config
        self._first_layer = first_layer
        self.backend = backend
        for index in range(config.num_layers):
            backend.check(_head_shape(config, index))
        source.check(tensor_shapes(config, has_head=source.has("lm_head.weight")))
        cosines, sines = rope_table(config, max_model_len)
        self._rope = (cosines.to(backend.device), sines.to(backend.device))
        size = (config.vocab_size, config.hidden_size)
        self._embedding = self._tensor(source, "model.embed_tokens.weight", size)
        self._layers = [self._load_layer(index, source) for index in range(config.num_layers)]
        self._norm = self._tensor(source, "model.norm.weight", (config.hidden_size,))
        self._head = self._load_head(source)
        source.finish()

    def _tensor(self, source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
        memory = self.backend.memory(*shape)
        source.fill(name, shape, memory)
        return memory

    def _load_head(self, source: TensorSource) -> Linear:
        """A head that is stored although it is tied counts where it differs from the embedding,
        as in transformers."""
        name, tied = "lm_head.weight", self.config.tie_word_embeddings
        if tied and not source.has(name):
            return self.backend.tied_linear(self._embedding)
        head = self._tensor(source, name, (self.config.vocab_size, self.config.hidden_size))
        if tied:
            source.finish()
            if torch.equal(head, self._embedding):
                return self.backend.tied_linear(self._embedding)
        return self.backend.linear(head, None)

    def _load_layer(self, index: int, source: TensorSource) -> Layer:
        config, backend = self.config, self.backend
        shapes = layer_shapes(config, index)
        prefix = f"model.layers.{index}."

        def read(name: str) -> Tensor:
            return self._tensor(source, prefix + name, shapes[prefix + name])

        def together(names: list[str]) -> Tensor | None:
            """Several tensors in one, by rows."""
            found = [shapes[prefix + name] for name in names if prefix + name in shapes]
            if not found:
                return None
            rows = [shape[0] for shape in found]
            memory = backend.memory(sum(rows), *found[0][1:])
            for name, shape, place in zip(names, found, torch.split(memory, rows), strict=True):
                source.fill(prefix + name, shape, place)
            return memory

        def linear(*names: str, is_gated: bool = False) -> Linear:
            """One product for several projections of the same input."""
            prepare = backend.gated_linear if is_gated else backend.linear
            weight = together([f"{name}.weight" for name in names])
            assert weight is not None
            return prepare(weight, together([f"{name}.bias" for name in names]))

        norms = None
        if config.qk_norm:
            norms = (read("self_attn.q_norm.weight"), read("self_attn.k_norm.weight"))
        return Layer(
            shape=_head_shape(config, index),
            input_norm=read("input_layernorm.weight"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_norms=norms,
            output=linear("self_attn.o_proj"),
            mlp_norm=read("post_attention_layernorm.weight"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj", is_gated=True),
            down=linear("mlp.down_proj"),
        )

    @torch.inference_mode()
    def forward(self, rows: Rows, cache: KVCache) -> Tensor:
        """Hidden states before the final norm, `[rows, hidden]`; stores KV at `rows.slots`."""
        backend, eps = self.backend, self.config.rms_norm_eps
        border = rows.padded_generated
        residual = F.embedding(rows.token_ids, self._embedding)
        hidden = None
        for index, layer in enumerate(self._layers, self._first_layer):
            if hidden is None:
                hidden = backend.rms_norm(residual, layer.input_norm, eps)
            else:
                hidden = backend.add_rms_norm(hidden, residual, layer.input_norm, eps)
            attended = backend.attention(
                layer.qkv(hidden, border), rows, cache, index, layer.shape, self._rope, layer.head_norms, eps
            )
            hidden = layer.output(attended, border)
            hidden = backend.add_rms_norm(hidden, residual, layer.mlp_norm, eps)
            hidden = backend.gated_mlp(hidden, layer.gate_up, layer.down, border)
        assert hidden is not None
        residual += hidden
        return residual

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[rows, vocab]` of chosen rows of `forward`, in the backend's dtype.

        Every row counts as generated here, whatever it was before: one class for all logits.
        """
        rows = hidden.shape[0]
        padded = self.backend.row_plan.padded_generated(rows)
        hidden = F.pad(hidden, (0, 0, 0, padded - rows))
        normed = self.backend.rms_norm(hidden, self._norm, self.config.rms_norm_eps)
        return self._head(normed, padded)[:rows]


def _head_shape(config: ModelConfig, index: int) -> HeadShape:
    return HeadShape(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim, config.windows[index]
    )


def layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Tensor names of one layer, as Hugging Face writes them, and their shapes `[out, in]`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qk_norm:
        shapes |= {f"self_attn.{n}_norm.weight": (config.head_dim,) for n in "qk"}
    if config.qkv_bias:
        shapes |= {
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.bias": (key_value,),
            "self_attn.v_proj.bias": (key_value,),
        }
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def tensor_shapes(config: ModelConfig, *, has_head: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this model must have. A tied head may be stored or not."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    for index in range(config.num_layers):
        shapes |= layer_shapes(config, index)
    if has_head or not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes
