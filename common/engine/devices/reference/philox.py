"""The noise of `sampling.noise` on torch tensors, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.sampling.noise import (
    GROUP,
    GROUP_DOMAIN,
    GROUP_SHIFT,
    MASK,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    TOKEN_DOMAIN,
    WEYL_0,
    WEYL_1,
)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32; words are int64 tensors in [0, 2**32), shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64; shift and mask recover the high word.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high0, high1 = (p0 >> 32) & MASK, (p1 >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """`-log(u)` as float64 from two 32-bit words, of which the first 52 bits count."""
    bits = (high << 20) | (low >> 12)
    return -torch.log((bits.double() + 0.5) * 2.0**-52)


def group_noise(key: NoiseKey, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least exponential of each group (float64) and the offset in [0, 256) that has it."""
    x0, x1, x2, _ = philox(
        (groups, key.position, key.choice, _domain(GROUP_DOMAIN, groups)), (key.seed_low, key.seed_high)
    )
    return exponential(x0, x1) / GROUP, x2 >> (32 - GROUP_SHIFT)


def token_noise(key: NoiseKey, tokens: Tensor, least: Tensor, holder: Tensor) -> Tensor:
    """The exponential of each token, given its group's `least` and `holder` (see `group_noise`)."""
    x0, x1, _, _ = philox(
        (tokens, key.position, key.choice, _domain(TOKEN_DOMAIN, tokens)), (key.seed_low, key.seed_high)
    )
    return torch.where(tokens % GROUP == holder, least, least + exponential(x0, x1))


def _domain(constant: int, like: Tensor) -> Tensor:
    return torch.full((), constant, dtype=torch.int64, device=like.device)


class NoiseKey:
    """What noise is keyed by, per row: int64 tensors `[rows, 1]`, each a 32-bit word."""

    def __init__(self, seeds: Tensor, choices: Tensor, positions: Tensor) -> None:
        """`seeds` is the unsigned 64-bit seed reinterpreted as int64; all of shape `[rows]`."""
        self.seed_low = (seeds & MASK).unsqueeze(1)
        self.seed_high = ((seeds >> 32) & MASK).unsqueeze(1)
        self.choice = (choices & MASK).unsqueeze(1)
        self.position = (positions & MASK).unsqueeze(1)

    def take(self, rows: Tensor) -> NoiseKey:
        """The keys of `rows` (int64 `[n]`, may repeat), as flat `[n]` words."""
        picked = NoiseKey.__new__(NoiseKey)
        for word in ("seed_low", "seed_high", "choice", "position"):
            setattr(picked, word, getattr(self, word)[rows, 0])
        return picked
