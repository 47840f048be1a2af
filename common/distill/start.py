"""What a draft is before it has learned anything: its shape, and its embedding from the target's.

Owns the default proportions. A draft is as slow as it is deep: few layers, and three eighths of the
target's width, which with two layers is about a tenth of the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.distill.network import Llama, Shape
from common.engine.devices.filling import HostFiller
from common.engine.model.weights import Checkpoint
from common.errors import ConfigError
from common.model_folder.model_config import ModelConfig

LAYERS = 2
UNIT = 32  # widths are multiples of it
EMBEDDING_SCALE = 0.02  # standard deviation, as of the other weights of a Llama


def shape_for(target: ModelConfig, layers: int | None, hidden_size: int | None) -> Shape:
    """A draft's shape; what is None follows from the target's. Raises `ConfigError`."""
    hidden = hidden_size or max(UNIT, target.hidden_size * 3 // 8 // UNIT * UNIT)
    if hidden % UNIT:
        raise ConfigError(f"--hidden-size must be a multiple of {UNIT}, not {hidden}", param="hidden_size")
    layers = layers or min(LAYERS, target.num_layers)
    head_dim = 64 if hidden >= 1024 else UNIT
    heads = hidden // head_dim
    kv_heads = max(n for n in range(1, max(1, heads // 3) + 1) if heads % n == 0)
    return Shape(
        vocab_size=target.vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=hidden * 11 // 3 // UNIT * UNIT,
        max_positions=target.rope.positions,
        rope_theta=target.rope.theta,
    )


def fresh(shape: Shape, target: ModelConfig, folder: Path, longest: int) -> Llama:
    """Layers at random; the embedding is the target's on its main axes (those of the head, where the target
    has one of its own: a draft's embedding is its head, too)."""
    draft = Llama(shape, longest=longest)
    size = (target.vocab_size, target.hidden_size)
    wide = torch.empty(size)
    with Checkpoint(folder) as checkpoint, HostFiller(1) as filler:
        tied = target.tie_word_embeddings and not checkpoint.has("lm_head.weight")
        stored = checkpoint.stored("model.embed_tokens.weight" if tied else "lm_head.weight", size)
        filler.fill(wide, stored)
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(on_main_axes(wide, shape.hidden_size))
    return draft


def on_main_axes(rows: Tensor, width: int) -> Tensor:
    """`rows` `[n, wide]` on the `width` directions in which they differ most, `[n, width]`, scaled. Where
    there are more directions than `rows` has, the others are noise."""
    _, axes = torch.linalg.eigh(rows.T @ rows)  # ascending
    axes = axes[:, -width:].flip(1)
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # their signs are a library's choice
    projected = rows @ axes
    if (missing := width - projected.shape[1]) > 0:
        noise = torch.randn(rows.shape[0], missing) * projected.std()
        projected = torch.cat((projected, noise), dim=1)
    scaled: Tensor = projected * (EMBEDDING_SCALE / projected.std().clamp_min(1e-12))
    return scaled
