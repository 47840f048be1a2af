"""Rotary position embedding: the table of cosines and sines for every position a node serves.

Owns the scaling formulas. The angle at a position is a function of that position alone, never of
how long a sequence has become, because cached keys are rotated once and shared.

Sources: RoFormer (arXiv:2104.09864); position interpolation for `linear` (arXiv:2306.15595);
NTK-by-parts and its attention factor for `yarn` (arXiv:2309.00071); `llama3` as published with
Llama 3.1; LongRoPE (arXiv:2402.13753) for `longrope`. Agreement with transformers is tested.
"""

from __future__ import annotations

import math

import torch

from common.errors import UnsupportedModel
from common.model_folder.model_config import ModelConfig
from common.model_folder.rope import RopeConfig


def rope_table(config: ModelConfig, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 `[max_positions, head_dim / 2]`.

    Raises `UnsupportedModel` when a `dynamic` model is asked for positions beyond its
    `max_position_embeddings`: there its angles depend on the final length of the sequence, so
    that no cached key would be right for two lengths.
    """
    rope = config.rope
    if rope.kind == "dynamic" and max_positions > rope.positions:
        raise UnsupportedModel(
            f"rope type dynamic cannot serve {max_positions} positions with cached keys; "
            f"set max_model_len to at most {rope.positions}",
            param="rope_parameters.rope_type",
        )
    inverse, scale = _inverse_frequencies(rope, config.head_dim, max_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse)
    return (angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous()


def _inverse_frequencies(rope: RopeConfig, dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Radians per position `[head_dim / 2]`, and the factor on cosines and sines."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inverse, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    if rope.kind == "longrope":
        return _longrope(rope, exponents, max_positions)
    return inverse, 1.0


def _llama3(inverse: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    factor, original = rope.factor, rope.original
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise UnsupportedModel(
            f"low_freq_factor {low} must be below high_freq_factor {high}",
            param="rope_parameters.low_freq_factor",
        )
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def _longrope(rope: RopeConfig, exponents: torch.Tensor, max_positions: int) -> tuple[torch.Tensor, float]:
    """One set of divisors for all positions of a node; transformers changes from the short set to
    the long one, within a sequence, which leaves the keys that it has cached turned otherwise."""
    divisors = torch.tensor(rope.factors(max_positions, len(exponents)), dtype=torch.float32)
    scale = 1.0
    if rope.parameters.get("attention_factor") is not None:
        scale = rope.number("attention_factor")
    elif rope.factor > 1:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original))
    return 1.0 / (divisors * rope.theta**exponents), scale


def _yarn(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    factor, original = rope.factor, rope.original

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.parameters.get("attention_factor") is not None:
        scale = rope.number("attention_factor")
    elif rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim"):
        scale = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    else:
        scale = magnitude(1.0)

    def correction_dim(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = correction_dim(rope.number("beta_fast", 32.0) or 32.0)
    high = correction_dim(rope.number("beta_slow", 1.0) or 1.0)
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    return ramp / (factor * frequencies) + (1 - ramp) / frequencies, scale
