"""Whether attention gives a row the same bits whoever computes it: shown on the card, when a model is loaded.

The same positions are computed as a prompt in large tiles, as the same prompt cut elsewhere, as generated
rows with all their splits side by side, and with one program for all splits. What a tensor core makes of a
sum is the card's business, and no source says it; so it is tried.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from common.engine.devices.cuda.attention import SPLIT, Attention, Segment, places_for
from common.engine.devices.scaled_rows import scaled

POSITIONS = 2 * SPLIT + 72  # three splits, the last of which is not whole
_SHIFT = 5  # by which the prompt is cut elsewhere


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionProof:
    is_one_class: bool  # generated rows have the bits of prompts
    digest: str  # of these bits


def prove(
    attention: Attention, most_rows: int, query_tile: int, device: torch.device, positions: int = POSITIONS
) -> AttentionProof:
    """Of tiles of at most `most_rows` generated rows, and of `query_tile` rows of prompts, the larger of the
    two counts for a launch."""
    case = _Case(attention, device, positions, max(most_rows, query_tile))
    whole = case.prompt(query_tile, 0)
    cut = case.prompt(query_tile, _SHIFT)
    last = positions - most_rows
    starts = sorted({0, 1, min(SPLIT - 1, last), min(SPLIT, last), last})
    rows = torch.tensor([start + row for start in starts for row in range(most_rows)], device=device)
    same = torch.equal(_bits(whole[_SHIFT:]), _bits(cut[_SHIFT:]))
    wanted = _bits(whole[rows])
    for places in (len(starts), places_for(len(starts), positions * len(starts))):
        same &= torch.equal(_bits(case.generated(starts, rows, most_rows, places)), wanted)
    digest = hashlib.blake2b(_bits(whole).cpu().numpy().tobytes(), digest_size=6).hexdigest()
    return AttentionProof(same, digest)


class _Case:
    """A prompt of `positions`, whose queries, keys and values are random but always the same."""

    def __init__(self, attention: Attention, device: torch.device, positions: int, most_rows: int) -> None:
        shape, size = attention.shape, attention.block_size
        self._attention, self._device, self._positions = attention, device, positions
        self._most_rows = most_rows
        blocks, width = -(-positions // size), shape.num_kv_heads * shape.head_dim
        source = torch.Generator().manual_seed(0)
        kind = attention.dtype
        pool = torch.randn(blocks, 2 * size * width, generator=source).to(kind)
        self._segment = Segment(pool.to(device), 0, size * width)
        if attention.kv_dtype is not None:
            self._segment = _in_8_bits(pool.view(blocks, -1, shape.head_dim), attention.kv_dtype, device)
        lines = (positions, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        self._qkv = torch.randn(lines, generator=source).to(kind).to(device)
        self._tables = torch.arange(blocks - 1, -1, -1, dtype=torch.int32, device=device)

    def _out(self, rows: int) -> Tensor:
        shape = self._attention.shape
        size = (rows, shape.num_heads * shape.head_dim)
        return torch.zeros(size, dtype=self._attention.dtype, device=self._device)

    def _tiles(self, tiles: list[tuple[int, int, int, int]]) -> Tensor:
        return torch.tensor(tiles, dtype=torch.int32, device=self._device)

    def prompt(self, tile: int, start: int) -> Tensor:
        """From `start` on, in tiles of so many rows."""
        out, end = self._out(self._positions), self._positions
        tiles = [(row, min(tile, end - row), row, 0) for row in range(start, end, tile)]
        attention, most = self._attention, self._most_rows
        attention.prompt(self._qkv, self._tiles(tiles), self._tables, self._segment, out, most)
        return out

    def generated(self, starts: list[int], rows: Tensor, most_rows: int, places: int) -> Tensor:
        """`rows`, which are tiles from `starts` on."""
        out = self._out(len(rows))
        tiles = self._tiles([(i * most_rows, most_rows, start, 0) for i, start in enumerate(starts)])
        attention = self._attention
        workspace = attention.workspace(len(rows), len(starts), most_rows, places, self._device)
        attention.list_work(tiles, workspace)
        attention.generated(self._qkv[rows].contiguous(), self._tables, self._segment, workspace, out)
        return out


def _in_8_bits(rows: Tensor, kv_dtype: torch.dtype, device: torch.device) -> Segment:
    """rows `[blocks, rows, head_dim]`, the keys' and then the values', as a pool holds them."""
    elements, scales = scaled(rows, kv_dtype)
    elements, scales = (part.view(torch.uint8).flatten(1) for part in (elements, scales.unsqueeze(-1)))
    size, count = elements.shape[1], rows.shape[1]
    slabs = torch.cat((elements, scales), 1).to(device)
    return Segment(slabs, 0, size // 2, size // 2, size // 2 + count // 2)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
