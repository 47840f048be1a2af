"""The noise of `sampling.noise`, by scalar code for kernels to call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.engine.devices.cpu.numba_runtime import exact
from common.engine.sampling.noise import (
    GROUP,
    GROUP_DOMAIN,
    GROUP_SHIFT,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    TOKEN_DOMAIN,
    WEYL_0,
    WEYL_1,
)

_M0, _M1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
_W0, _W1 = np.uint64(WEYL_0), np.uint64(WEYL_1)
_MASK, _32, _20, _12 = (np.uint64(v) for v in (0xFFFFFFFF, 32, 20, 12))
_TOP_BITS = np.uint64(32 - GROUP_SHIFT)
_GROUP_DOMAIN, _TOKEN_DOMAIN = np.uint64(GROUP_DOMAIN), np.uint64(TOKEN_DOMAIN)
_ULP52 = 2.0**-52


@exact
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox 4x32-10; every word a uint64 below 2**32."""
    for _ in range(ROUNDS):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@exact
def exponential(high: Any, low: Any) -> Any:
    bits = (high << _20) | (low >> _12)
    return -math.log((np.float64(bits) + 0.5) * _ULP52)


@exact
def group_noise(group: Any, position: Any, choice: Any, k0: Any, k1: Any) -> Any:
    """(least exponential of the group, offset of its holder)."""
    x0, x1, x2, _ = philox(np.uint64(group), position, choice, _GROUP_DOMAIN, k0, k1)
    return exponential(x0, x1) / GROUP, np.int64(x2 >> _TOP_BITS)


@exact
def token_noise(token: Any, position: Any, choice: Any, k0: Any, k1: Any) -> Any:
    x0, x1, _, _ = philox(np.uint64(token), position, choice, _TOKEN_DOMAIN, k0, k1)
    return exponential(x0, x1)
