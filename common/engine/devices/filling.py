"""How stored tensors come into the memory that a backend gives for them.

Owns what a stored tensor is to a device, the threads that read, and the way into memory of the host; a device
with memory of its own has another way (staging.py). Knows nothing of files, names of layers or kernels.

A *place* is memory of a weight, or a part of one: a view of any shape and strides with as many elements as
the tensor, in its order. Where the types differ, the tensor is converted. What comes to lie there is finite,
or the tensor is refused by name.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import CheckpointError

PIECE = 1 << 20  # bytes that are read and looked at in one go: they stay in a core's cache
CONVERTED_AT_ONCE = 8 << 20  # bytes
MOST_READERS = 8

# All bits of the exponent: a number that has them is an infinity or NaN (IEEE 754).
_EXPONENT: dict[torch.dtype, tuple[type[np.unsignedinteger[Any]], int]] = {
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float32: (np.uint32, 0x7F800000),
}


class Stored(Protocol):
    """A tensor that is yet to be read."""

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """Names it and its file, for errors."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, into: memoryview) -> None:
        """Its bytes from `start` on, as many as `into` has, by any thread. Raises `CheckpointError`."""
        ...


class Filler(Protocol):
    """A context: at its end nothing reads or copies any more, whatever has happened."""

    def fill(self, place: Tensor, stored: Stored) -> None:
        """Work that the device is given afterwards finds `stored` in `place`; the host, after `finish`.
        Raises `CheckpointError`, here or there."""
        ...

    def finish(self) -> None:
        """Wait until everything lies in its place. Raises `CheckpointError` for what is not finite there."""
        ...

    def __enter__(self) -> Filler: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Readers:
    """Threads that read one stretch of a tensor together. Closing ends them at their next piece."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights") if threads > 1 else None
        self._closed = threading.Event()

    def read(self, stored: Stored, start: int, into: NDArray[np.uint8], *, check: bool = False) -> None:
        """The bytes of `stored` from `start` on; with `check`, raises `CheckpointError` if they are not
        finite. Returns, or raises the first error, when no thread reads any more."""
        share = -(-len(into) // self._threads // PIECE) * PIECE
        if self._pool is None or share < 2 * PIECE:
            self._read(stored, start, into, check)
            return
        parts = [
            self._pool.submit(self._read, stored, start + done, into[done : done + share], check)
            for done in range(0, len(into), share)
        ]
        errors = [part.exception() for part in parts]
        for error in errors:
            if error is not None:
                raise error

    def _read(self, stored: Stored, start: int, into: NDArray[np.uint8], check: bool) -> None:
        memory = into.data
        for done in range(0, len(into), PIECE):
            if self._closed.is_set():
                raise RuntimeError("the weights are wanted no more")
            stored.read(start + done, memory[done : done + PIECE])
            if check and not is_finite(into[done : done + PIECE], stored.dtype):
                raise not_finite(stored)

    def close(self) -> None:
        """When it returns, no thread touches any memory."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class HostFiller:
    """Implements `Filler` for memory of the host: tensors are read where they are wanted."""

    def __init__(self, threads: int) -> None:
        self._readers = Readers(threads)
        self._scratch: NDArray[np.uint8] | None = None  # of tensors that are converted

    def fill(self, place: Tensor, stored: Stored) -> None:
        if stored.dtype == place.dtype and place.is_contiguous():
            self._readers.read(stored, 0, as_bytes(place), check=True)
            return
        if self._scratch is None:
            self._scratch = np.empty(CONVERTED_AT_ONCE, np.uint8)
        size = stored.dtype.itemsize
        for start, part in pieces(place, CONVERTED_AT_ONCE // size):
            read = self._scratch[: part.numel() * size]
            self._readers.read(stored, start * size, read)
            converted = torch.from_numpy(read).view(stored.dtype).to(place.dtype)
            if not is_finite(as_bytes(converted), place.dtype):
                raise why_not_finite(stored, place.dtype)
            part.copy_(converted.view(part.shape))

    def finish(self) -> None:
        """Everything lies there as soon as `fill` returns."""

    def __enter__(self) -> HostFiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.close()


def num_readers() -> int:
    """Threads that read for a device that computes by itself."""
    return min(MOST_READERS, len(os.sched_getaffinity(0)))


def pieces(place: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """All of `place` in parts of `most` elements at most: where each begins, in elements, and a view."""
    if place.numel() <= most:
        yield 0, place
    elif place.is_contiguous():
        for start in range(0, place.numel(), most):
            yield start, place.view(-1)[start : start + most]
    else:
        row = place[0].numel()
        together = max(1, most // row)
        for first in range(0, place.shape[0], together):
            part = place[first] if row > most else place[first : first + together]
            for start, smaller in pieces(part, most):
                yield first * row + start, smaller


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor of the host."""
    found: NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return found


def is_finite(content: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Whether no number is NaN or an infinity. By bits, a piece at a time: several times as fast as
    `torch.isfinite`, and in the thread that calls it."""
    words, exponent = _EXPONENT[dtype]
    for start in range(0, len(content), PIECE):
        numbers = content[start : start + PIECE].view(words)
        if np.bitwise_and(numbers, words(exponent)).max() == exponent:
            return False
    return True


def not_finite(stored: Stored) -> CheckpointError:
    return CheckpointError(f"{stored.where} has NaN or infinity", param=stored.name)


def why_not_finite(stored: Stored, dtype: torch.dtype) -> CheckpointError:
    """Of a tensor that was found to be so as `dtype`: reads it again, to tell what it is from what `dtype`
    makes of it, and both from what happened to it on its way."""
    piece, size = np.empty(PIECE, np.uint8), stored.dtype.itemsize
    left, fits = math.prod(stored.shape) * size, True
    with contextlib.closing(Readers(1)) as readers:
        for start in range(0, left, PIECE):
            read = piece[: min(PIECE, left - start)]
            readers.read(stored, start, read)
            if not is_finite(read, stored.dtype):
                return not_finite(stored)
            fits &= is_finite(as_bytes(torch.from_numpy(read).view(stored.dtype).to(dtype)), dtype)
    kind = str(dtype).removeprefix("torch.")
    if fits:
        return CheckpointError(
            f"{stored.where} is finite, but not where it was copied to: the device or its memory is at fault",
            param=stored.name,
        )
    return CheckpointError(f"{stored.where} has numbers that are too large for {kind}", param=stored.name)
