"""Counter-based noise: the exponential race behind Gumbel-max, at random access.

Owns the definition of the noise of one token, and its constants. Each device has code of its own for
it, and all give the same integers (`tests/unit/engine/test_sampler.py`).

Philox 4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

**The noise of a token** is a function of (seed, choice, position, token id) and of nothing else,
neither the logits nor the vocabulary's size. `argmax(d_i + g_i)` with Gumbel `g_i` is the same as
`argmax(d_i - log E_i)` with independent `E_i ~ Exp(1)`. The `E_i` are drawn by groups of 256 ids:

    M   = -log(u_group) / 256            the least E of the group: Exp(256)
    J   = one of the 256 ids, uniform    who has it
    E_J = M,   E_i = M + Exp(1)          the others: an exponential has no memory

which is an exact way to draw 256 independent exponentials. It gives the sampler a bound for 256
tokens (`d_i - log E_i <= max d - log M`) for the price of one Philox block, and a close estimate of
the winning score before any other noise is drawn; hence noise is drawn for the few tokens only
that can still win, with flat logits too.

A Philox block has the key (seed low, seed high) and the counter (group or token id, position,
choice, domain). Uniforms have 52 bits and lie in (0, 1) at odd multiples of 2**-53.
"""

from __future__ import annotations

import math

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF

GROUP_SHIFT = 8
GROUP = 1 << GROUP_SHIFT  # token ids that share one group draw; also the tile of group maxima
GROUP_DOMAIN = 0x70647147  # "pdqG"
TOKEN_DOMAIN = 0x70647154  # "pdqT"

# No group draw can lie below: u is at most 1 - 2**-53.
LOG_LEAST = math.log(2.0**-53) - math.log(GROUP)
