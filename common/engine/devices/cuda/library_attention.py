"""A backend whose attention is a library's: for who gives up the numerics rule (`--attention`).

Owns what both libraries have in common: a step's tiles as ragged requests over pages, planned once a step for
each kind of layer, and the class of numerics. All but attention is the reference's.

The libraries choose how they split a sequence by the whole batch and by the number of multiprocessors, so
that a token may depend on who else is in the step: the class says `unrepeatable`. It names the library, its
version and the card, and no process, unlike the reference's: somebody has asked for it, and what one node has
computed is as good at another of that class, so prompts are handed over and prefixes reused among them. What
ends is the promise that a request gives the same tokens again; one that goes on elsewhere after a failure
still goes on from the tokens that were delivered.
"""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.device import HeadShape
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.reference.backend import ReferenceBackend, rotate, store
from common.engine.devices.rows import Rows
from common.errors import ConfigError
from common.kv_layout import UNREPEATABLE


@dataclasses.dataclass(frozen=True, slots=True)
class PagedRequests:
    """Rows of sequences, on the host. The rows of request `i` are `query_ends[i]` to `query_ends[i + 1]`, and
    are the last positions of the `lengths[i]` that lie in the pages `page_ends[i]` to `page_ends[i + 1]`."""

    query_ends: NDArray[np.int32]  # [requests + 1], from 0
    page_ends: NDArray[np.int32]  # [requests + 1], from 0
    pages: NDArray[np.int32]  # block ids
    lengths: NDArray[np.int32]  # [requests]

    @property
    def num_requests(self) -> int:
        return len(self.lengths)

    def last_page_lengths(self, block_size: int) -> NDArray[np.int32]:
        """Positions in the last page of each, 1 to `block_size`."""
        found: NDArray[np.int32] = ((self.lengths - 1) % block_size + 1).astype(np.int32)
        return found

    def of(self, first: int, last: int) -> PagedRequests:
        """Those from `first` to `last`."""
        queries, ends = self.query_ends[first : last + 1], self.page_ends[first : last + 1]
        pages = self.pages[ends[0] : ends[-1]]
        return PagedRequests(queries - queries[0], ends - ends[0], pages, self.lengths[first:last])

    @classmethod
    def from_tiles(
        cls, tiles: NDArray[np.int32], tables: NDArray[np.int32], block_size: int
    ) -> PagedRequests:
        """`tiles` and `tables` as in `Rows`, of rows without padding."""
        counts, lengths = tiles[:, 1], tiles[:, 2] + tiles[:, 1]
        query_ends = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        assert np.array_equal(query_ends[:-1], tiles[:, 0]), "rows that belong to nobody"
        page_counts = -(-lengths // block_size)
        page_ends = np.concatenate(([0], np.cumsum(page_counts))).astype(np.int32)
        at = np.arange(page_ends[-1]) - np.repeat(page_ends[:-1] - tiles[:, 3], page_counts)
        return cls(query_ends, page_ends, tables[at].astype(np.int32), lengths.astype(np.int32))


class LibraryAttention(Protocol):
    """A library, on one device, for pages of one size."""

    name: str  # with its version, in the numerics class

    def check(self, shape: HeadShape, dtype: torch.dtype) -> None:
        """Raises `UnsupportedModel` or `ConfigError` for heads that the library does not compute."""
        ...

    def plan(self, requests: PagedRequests, shapes: list[HeadShape], dtype: torch.dtype) -> None:
        """Once a step, before the layers, of which each has one of `shapes`."""
        ...

    def run(self, query: Tensor, keys: Tensor, values: Tensor, shape: HeadShape) -> Tensor:
        """Query `[rows, heads, head_dim]`; keys and values as `KVCache.view` gives them. Returns as query."""
        ...


class LibraryBackend(ReferenceBackend):
    """See `Backend`."""

    kv_dtypes: tuple[str, ...] = ()  # no library takes a scale for each position and head

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        attention: LibraryAttention,
        block_size: int,
    ) -> None:
        super().__init__(device, dtype, name)
        self._attention, self._block_size = attention, block_size
        self._shapes: list[HeadShape] = []  # each once
        described = (attention.name, name, str(dtype), f"torch-{torch.__version__}", UNREPEATABLE)
        self._class = "/".join(("library", *described)).replace(" ", "-")

    def check(self, shape: HeadShape) -> None:
        if shape not in self._shapes:
            self._attention.check(shape, self.dtype)
            self._shapes.append(shape)

    def prepare(self, rows: Rows) -> Rows:
        requests = PagedRequests.from_tiles(rows.tiles.numpy(), rows.tables.numpy(), self._block_size)
        self._attention.plan(requests, self._shapes, self.dtype)
        return super().prepare(rows)

    def attention(
        self,
        qkv: Tensor,
        rows: Rows,
        cache: KVCache,
        layer: int,
        shape: HeadShape,
        rope: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = torch.split(qkv.view(rows.num_rows, sum(sizes), shape.head_dim), sizes, dim=1)
        if norms is not None:
            query = self.rms_norm(query, norms[0], eps)
            key = self.rms_norm(key, norms[1], eps)
        query = rotate(query, rows.positions, rope, shape.rotary_dim)
        keys, values = cache.view(layer, "k"), cache.view(layer, "v")
        store(keys, rotate(key, rows.positions, rope, shape.rotary_dim), rows.slots)
        store(values, value, rows.slots)
        return self._attention.run(query, keys, values, shape).reshape(rows.num_rows, -1)


def library_version(setting: str, package: str, least: tuple[int, ...]) -> str:
    """Of an installed package; `ConfigError` where it is missing, or older than `least`."""
    wanted = ".".join(map(str, least))
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"attention {setting} is set, but {package} is not installed; install {package}>={wanted}, or "
            "leave attention to our own kernels",
            param="attention",
        ) from error
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.partition("+")[0].split("."))
    if numbers < least:
        raise ConfigError(
            f"attention {setting} is set, and {package} is {found}; it takes {wanted} or later",
            param="attention",
        )
    return found


def window_left(shape: HeadShape) -> int:
    """Positions before a row that it sees, in the libraries' way: -1 for all."""
    return shape.window - 1 if shape.window else -1
