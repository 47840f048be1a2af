"""The proof at load that a product's rows depend on themselves alone, and in which order they are summed.

Owns operands whose products are nothing but what the order of summation leaves, and the ladder: for each
bucket of rows the first of several ways that gives the bits which the weight's order gives, wherever a row
lies, whatever lies beside it. A way that does not, that fails or that is nonsense is not used, and a line
says why. Knows no kernel: a way is called, and what it leaves is looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.engine.devices.cuda.product_plans import BUCKETS, Shape, bucket_of
from common.logs import get_logger

log = get_logger("products")

_BITS = {2: torch.int16, 4: torch.int32}
_PERIOD = 61  # rows of a weight that differ: a prime, so that no tile begins as another
_SCALE = 2.0**7  # of both operands: what is left of a sum is then no subnormal number in any type


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """tensor `[weight_rows, in]`, bias `[weight_rows]`, on the device, columns side by side."""

    shape: Shape
    tensor: Tensor
    bias: Tensor | None


class Way(Protocol):
    """One way to compute a product of any number of rows."""

    @property
    def name(self) -> str: ...

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        """x `[rows, in]` → out `[rows, out]`, contiguous."""
        ...


Ranking = Callable[[int, Sequence[Way]], Sequence[Way]]  # ways of a bucket, by its number, fastest first


def as_given(bucket: int, ways: Sequence[Way]) -> Sequence[Way]:
    return ways


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """Numbers of rows that are tried, each with rows of both ends of a longer batch, and between rows of NaN
    and infinity; `repeats` times, for programs may meet in another order. A bucket of which none is tried
    is served as the one before it."""

    rows: tuple[int, ...]
    repeats: int
    most_outputs: int = 1 << 27  # numbers of one result: more rows than these have are not tried

    def sizes(self, shape: Shape, bucket: int) -> list[int]:
        most = max(BUCKETS[-1], self.most_outputs // shape.out_features)
        return [rows for rows in self.rows if bucket_of(rows) == bucket and rows <= most]

    def most_rows(self, shape: Shape) -> int:
        return max(rows for bucket in range(len(BUCKETS) + 1) for rows in (1, *self.sizes(shape, bucket)))


_SIZES = "1 2 3 4 7 8 9 15 16 17 24 31 32 33 48 63 64 65 96 127 128 129 192 255 256 257 300 512 777 1024 2048"
FULL = Proof(rows=tuple(map(int, _SIZES.split())), repeats=3)
QUICK = Proof(rows=(3, 20), repeats=1)  # where kernels are interpreted


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """A way for each of `BUCKETS` and for more rows; a digest of what they all give."""

    ways: tuple[Way, ...]
    digest: str


class Operands:
    """Rows and a weight of one shape, on a device; the same numbers on every device."""

    def __init__(self, shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        x, few, bias = _cancelling(shape, rows, dtype)
        self.x = x.to(device)
        tensor = few.to(device)[torch.arange(shape.weight_rows, device=device) % len(few)]
        self.weight = Weight(shape, tensor, None if bias is None else bias.to(device))

    def result(self, way: Way, x: Tensor) -> Tensor:
        """Rows that a way does not write stay NaN."""
        out = x.new_full((x.shape[0], self.shape.out_features), float("nan"))
        way(self.weight, x, out)
        return out


def settle(
    operands: Operands,
    ladder: Sequence[Sequence[Way]],
    proof: Proof,
    describe: str,
    ranked: Ranking = as_given,
) -> Settled | None:
    """The fastest right way of each bucket. The first way of the first bucket that agrees with itself says
    what is right, however fast it is: the order must not depend on a measurement. Where no way of a bucket is
    right, that of the bucket before it serves. None if no way of few rows agrees with itself.

    Raises what says that the device has no memory.
    """
    first_sizes = proof.sizes(operands.shape, 0)
    for first in ladder[0]:
        reason, wanted = _judge(first, operands, first_sizes, None, proof.repeats)
        if reason is None:
            break
        log.warning("products.refused", shape=describe, bucket=0, way=first.name, reason=reason)
    else:
        return None
    chosen: list[Way] = [first]
    for bucket, ways in enumerate(ladder):
        sizes = proof.sizes(operands.shape, bucket)
        candidates = ranked(bucket, ways) if sizes else ()  # what is not tried is not used
        for way in (*candidates, chosen[-1]):
            if way is first and bucket == 0:
                break
            reason, _ = _judge(way, operands, sizes, wanted, proof.repeats)
            if reason is None:
                break
            log.warning("products.refused", shape=describe, bucket=bucket, way=way.name, reason=reason)
        else:
            return None
        chosen.append(way)
    return Settled(tuple(chosen[1:]), digest_of(wanted[: BUCKETS[0]]))


def _judge(
    way: Way, operands: Operands, sizes: Sequence[int], wanted: Tensor | None, repeats: int
) -> tuple[str | None, Tensor]:
    """Why the way cannot be used, if so; and what all ways must give."""
    try:
        if wanted is None:
            wanted = _by_few(way, operands)
            if not is_near(operands, way):
                return "its sums are wrong", wanted
        for _ in range(repeats):
            for rows in sizes:
                if (reason := _difference(way, operands, rows, wanted)) is not None:
                    return reason, wanted
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a launch's, a library's: none of them has a common class
        return f"{type(error).__name__}: {error}", operands.x if wanted is None else wanted
    return None, wanted


def _by_few(way: Way, operands: Operands) -> Tensor:
    parts = range(0, operands.x.shape[0], BUCKETS[0])
    return torch.cat([operands.result(way, operands.x[first : first + BUCKETS[0]]) for first in parts])


def _difference(way: Way, operands: Operands, rows: int, wanted: Tensor) -> str | None:
    """In what the way's product of so many rows differs from `wanted`, that of all rows."""
    last = operands.x.shape[0] - rows
    for first in {0, last}:
        here = slice(first, first + rows)
        if not same_bits(operands.result(way, operands.x[here]), wanted[here]):
            return f"other bits with {rows} rows"
    for places, x in among_strangers(operands.x[:rows]):
        if not same_bits(operands.result(way, x)[places], wanted[places]):
            return f"with {rows} rows, one depends on the others"
    return None


def among_strangers(x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The rows, all but some of them NaN or infinite, and which are not."""
    rows = x.shape[0]
    places = sorted({0, rows // 2, rows - 1})
    if len(places) < rows:
        strange = torch.full_like(x, float("nan"))
        strange[1::2] = float("inf")
        strange[places] = x[places]
        yield places, strange


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = _BITS[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind)) and not bool(one.isnan().any())


def digest_of(result: Tensor) -> str:
    content = result.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def is_near(operands: Operands, way: Way) -> bool:
    """Whether products of ordinary numbers are what float64 says, in the first and the last columns."""
    shape, weight = operands.shape, operands.weight
    rows = min(4, operands.x.shape[0])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, shape.in_features, generator=generator).to(weight.tensor)
    few = (torch.randn(_PERIOD, shape.in_features, generator=generator) / shape.in_features**0.5).to(x)
    place = torch.arange(shape.weight_rows, device=x.device) % _PERIOD
    out = x.new_full((rows, shape.out_features), float("nan"))
    way(Weight(shape, few[place], weight.bias), x, out)

    seen = torch.cat(
        [torch.arange(shape.out_features)[:_PERIOD], torch.arange(shape.out_features)[-_PERIOD:]]
    )
    seen = seen.to(x.device)
    parts = []
    for first in (0, shape.out_features) if shape.gated else (0,):
        at = first + seen
        total = x.double() @ few[place[at]].double().T
        parts.append(total if weight.bias is None else total + weight.bias[at].double())
    wanted = torch.nn.functional.silu(parts[0]) * parts[1] if shape.gated else parts[0]
    # sums of as many numbers of about 1, and three roundings at most, to a type that is no wider than float32
    tolerance = 4 * torch.finfo(x.dtype).eps + 2.0**-22 * shape.in_features
    return bool(((out[:, seen].double() - wanted).abs() <= tolerance * (1 + wanted.abs()) * 4).all())


def _cancelling(shape: Shape, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, the first rows of a weight, and a bias, on the host.

    Their products cancel in pairs of columns that lie anywhere, so that nothing is left of a sum but what its
    order leaves, in every element. A bias is as small as that, so that it matters when it is added.
    """
    generator = torch.Generator().manual_seed(0)
    depth, half = shape.in_features, shape.in_features // 2
    few = min(_PERIOD, shape.weight_rows)
    one, other = torch.randperm(depth, generator=generator)[: 2 * half].view(2, half)
    x, weight = torch.zeros(rows, depth, dtype=dtype), torch.zeros(few, depth, dtype=dtype)
    x[:, one] = (torch.randn(rows, half, generator=generator) * _SCALE).to(dtype)
    weight[:, one] = (torch.randn(few, half, generator=generator) * _SCALE).to(dtype)
    x[:, other], weight[:, other] = x[:, one], -weight[:, one]
    bias = None
    if shape.biased:
        size = _SCALE**2 * 2.0**-20
        bias = (torch.randn(shape.weight_rows, generator=generator) * size).to(dtype)
    return x, weight, bias
