"""What all kernels of the sampler share: records, logits, keys, masses and noise, by one definition each.

A row's logits are taken by programs of its own, each of which has `TILES` tiles of `TILE_GROUPS` groups of
256 tokens. What programs find is joined by maxima, by sums of integers, or by (score, id), so that neither
the order nor the number of programs shows in a token.

A *descending key* is an integer in [0, 2**32) that is the smaller the larger a logit is; 0.0 and -0.0 have
one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.engine.sampling import noise, softmax_mass

# What has an element for each row: of a group of a step's rows it is a slice, which begins anywhere. Code
# that was compiled for what is aligned would be compiled anew for the first that is not, while a step waits.
OF_ROWS = (
    *("slots", "positions", "sources", "drafted", "draft_start", "draft_length"),
    *("tokens", "faults", "chosen", "ranks", "top_ids", "top"),
)

RECORD_WORDS = 16  # of 8 bytes, of a slot

# the words of a record (sampler_state.py fills them)
TEMPERATURE = tl.constexpr(0)  # float64, as the next two
TOP_P = tl.constexpr(1)
MIN_P_CUT = tl.constexpr(2)
SEED = tl.constexpr(3)
CHOICE = tl.constexpr(4)
TOP_K = tl.constexpr(5)
MIN_POSITION = tl.constexpr(6)
COUNTS = tl.constexpr(7)  # row of the token counts; -1: no penalties
LOGPROBS = tl.constexpr(8)  # alternatives wanted; -1: none of it
EDITS = tl.constexpr(9)  # start, and length above 32 bits; as the next two
ALLOWED = tl.constexpr(10)
STOPS = tl.constexpr(11)
SCALES = tl.constexpr(12)  # inverse temperature and repetition, float32
PENALTIES = tl.constexpr(13)  # presence and frequency, float32
EDITED = tl.constexpr(14)  # logits differ from the model's
WORDS = tl.constexpr(RECORD_WORDS)

# what is known of a row once its peaks are: words of 8 bytes
STATE_WORDS = 8
FAULT = tl.constexpr(0)
FIRST = tl.constexpr(1)  # the lowest id of the largest logit
PEAK = tl.constexpr(2)  # the largest logit's bits
FLOOR_KEY = tl.constexpr(3)  # no descending key above it is among the k first
HOT, BY_COUNT, BY_SHARE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)  # temperature, top_k, top_p count
STATE = tl.constexpr(STATE_WORDS)

GROUP = tl.constexpr(noise.GROUP)
TILE_GROUPS = tl.constexpr(8)
RACE_GROUPS = tl.constexpr(2)  # of a tile of the race, which computes in float64

MASK_32 = tl.constexpr(0xFFFFFFFF)
NO_TOKEN = tl.constexpr(2**31 - 1)
INFINITE = tl.constexpr(float("inf"))
_LEAST_FLOOR = tl.constexpr(softmax_mass.FLOOR)
_LOG2_E = tl.constexpr(softmax_mass.LOG2_E)
_LN2_HIGH, _LN2_LOW = tl.constexpr(softmax_mass.LN2_HIGH), tl.constexpr(softmax_mass.LN2_LOW)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (tl.constexpr(c) for c in softmax_mass.POLYNOMIAL)
_ROUND = tl.constexpr(1.5 * 2**23)  # added and subtracted: to the nearest integer, half to even
_EXPONENT = tl.constexpr(127 + softmax_mass.MASS_BITS)
_GROUP_DOMAIN, _TOKEN_DOMAIN = tl.constexpr(noise.GROUP_DOMAIN), tl.constexpr(noise.TOKEN_DOMAIN)
_HOLDER_SHIFT = tl.constexpr(32 - noise.GROUP_SHIFT)
_ULP_52 = tl.constexpr(2.0**-52)
_PER_GROUP = tl.constexpr(1.0 / noise.GROUP)


@triton.jit
def double_of(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 in the lower half of an int64."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value):
    """A float32 as an int64 that `float_of` reads."""
    return value.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def row_values(logits, work, edited, ids, inside):
    """Logits float32 of `ids`: those of the model, of its row `logits`, or of `work` where they were edited;
    -inf for ids that there are not."""
    raw = tl.load(logits + ids, mask=inside & (edited == 0), other=0.0).to(tl.float32)
    changed = tl.load(work + ids, mask=inside & (edited != 0), other=0.0)
    return tl.where(inside, tl.where(edited != 0, changed, raw), -INFINITE)


@triton.jit
def descending(value):
    """int64 descending key of a float32."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return 0x7FFFFFFF - ordered.to(tl.int64)


@triton.jit
def value_of(key):
    """The float32 that has a descending key."""
    ordered = (0x7FFFFFFF - key).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_kept(value, ids, cut, last):
    return (value > cut) | ((value == cut) & (ids <= last))


@triton.jit
def mass(value, peak, inverse_temperature):
    """int64, see `sampling.softmax_mass`; correctly rounded operations in float32, and none fused."""
    x = tl.maximum((value - peak) * inverse_temperature, _LEAST_FLOOR)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    f = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = (((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _P0
    power = ((n.to(tl.int32) + _EXPONENT) << 23).to(tl.float32, bitcast=True)
    return (p * power).to(tl.int64)


@triton.jit
def exponential(high, low):
    """`-log(u)` float64 of two words, see `sampling.noise`."""
    bits = (high.to(tl.int64) << 20) | (low.to(tl.int64) >> 12)
    return -tl.log((bits.to(tl.float64) + 0.5) * _ULP_52)


@triton.jit
def group_noise(group, seed, choice, position):
    """(least exponential float64, offset int32 of its holder) of int32 groups."""
    zero = group * 0
    x0, x1, x2, _ = tl.philox(
        seed,
        group.to(tl.uint32),
        (zero + position.to(tl.int32)).to(tl.uint32),
        (zero + choice.to(tl.int32)).to(tl.uint32),
        zero.to(tl.uint32) + _GROUP_DOMAIN,
    )
    return exponential(x0, x1) * _PER_GROUP, (x2 >> _HOLDER_SHIFT).to(tl.int32)


@triton.jit
def token_noise(ids, seed, choice, position):
    """What a token of int32 id adds to the least exponential of its group, if it does not hold that."""
    zero = ids * 0
    x0, x1, _, _ = tl.philox(
        seed,
        ids.to(tl.uint32),
        (zero + position.to(tl.int32)).to(tl.uint32),
        (zero + choice.to(tl.int32)).to(tl.uint32),
        zero.to(tl.uint32) + _TOKEN_DOMAIN,
    )
    return exponential(x0, x1)
