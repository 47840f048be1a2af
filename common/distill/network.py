"""A Llama in plain torch, for training only.

Owns the arithmetic of the forward pass and the parameter names, which are those of a
Hugging Face `LlamaForCausalLM`, so that a state dict is a checkpoint. Knows nothing of text,
optimizers or files. Serving has its own implementation; that both (and transformers) give the
same logits is what makes a checkpoint of it a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Dimensions of one Llama with tied embeddings."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def num_parameters(self) -> int:
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        return self.hidden_size * (self.vocab_size + 1) + self.num_layers * layer


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, each `[positions, head_dim]` (half-split layout)."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), shape.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of `x` `[batch, heads, length, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class BranchDropout(nn.Module):
    """Dropout of whole features of a residual branch: one mask per sequence, not per token.

    Variational dropout (Gal and Ghahramani 2016); on a CPU it costs nothing, where a mask per
    token costs a tenth of the step.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) < keep
        return x * (mask / keep).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        mixed: Tensor = self.o_proj(out.reshape(batch, length, -1))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return mixed


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = BranchDropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        fed: Tensor = self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x + fed


class Body(nn.Module):
    """Everything below the output projection (`model.` in a checkpoint)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.dropout = BranchDropout(dropout)


class Llama(nn.Module):
    """Token ids `[batch, length]` to logits `[batch, length, vocab]`; embeddings are tied."""

    cos: Tensor  # [longest, head_dim]
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0, longest: int | None = None) -> None:
        """`longest`: positions of a sequence in training (none: all that the shape has)."""
        super().__init__()
        self.shape = shape
        self.model = Body(shape, dropout)
        cos, sin = rope_tables(shape, longest or shape.max_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            scale = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= (2 * self.shape.num_layers) ** 0.5
            elif "embed_tokens" in name:
                scale = 0.02
            nn.init.normal_(parameter, std=scale)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.dropout(self.model.embed_tokens(ids))
        kind, length = x.device.type, ids.shape[1]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
