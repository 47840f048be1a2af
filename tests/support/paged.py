"""Sequences in a paged pool whose every other cell is NaN, and their attention in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.devices.cuda.attention import Attention, Segment
from common.engine.devices.device import HeadShape
from common.engine.devices.scaled_rows import scaled, unscaled

NOWHERE = float("nan")  # what lies in blocks that nobody holds, and beyond a sequence's end
PADDING = (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    group: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    scale: float = 0.0
    split: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # of 8 bits

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def attention(self, capability: int = 80, multiprocessors: int = 2) -> Attention:
        shape = HeadShape(self.heads, self.kv_heads, self.head_dim, self.head_dim, self.window)
        return Attention(
            shape,
            self.dtype,
            self.block_size,
            capability=capability,
            multiprocessors=multiprocessors,
            scale=self.scale,
            soft_cap=self.soft_cap,
            split=self.split,
            kv_dtype=self.kv_dtype,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows `[first, end)` of a sequence, which has no later ones yet."""

    sequence: int
    first: int
    end: int


class Paged:
    """Queries, keys and values of sequences of these lengths."""

    def __init__(self, case: Case, lengths: Sequence[int], seed: int = 0) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(seed)
        self.queries = [self._normal(length, case.heads, case.head_dim) for length in lengths]
        self.keys = [self._normal(length, case.kv_heads, case.head_dim) for length in lengths]
        self.values = [self._normal(length, case.kv_heads, case.head_dim) for length in lengths]

    def read_back(self, kv_dtype: torch.dtype) -> Paged:
        """The same, with such keys and values as are read of what is stored in 8 bits."""
        other = copy.copy(self)
        for name in ("keys", "values"):
            rows = [unscaled(*scaled(x, kv_dtype)).to(self.case.dtype) for x in getattr(self, name)]
            setattr(other, name, rows)
        return other

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator).to(self.case.dtype)

    def attend(
        self,
        runs: Sequence[Run],
        *,
        prompt: bool = False,
        padding: int = 0,
        places: int = 0,
        most_rows: int = 0,
        capability: int = 80,
        multiprocessors: int = 2,
        bad: Sequence[tuple[int, int]] = (),
    ) -> list[Tensor]:
        """What the rows of each run give, `[rows, heads, head_dim]`, in one launch. Before, between and
        behind the runs lie `padding` rows and tiles of none. Blocks are placed anew by each call. `bad`:
        positions of a sequence whose keys and values are NaN."""
        case, attention = self.case, self.case.attention(capability, multiprocessors)
        pool, tables, starts = self.pool(runs, bad)
        rows = sum(run.end - run.first + padding for run in runs) + padding
        qkv = torch.full((rows, (case.heads + 2 * case.kv_heads) * case.head_dim), NOWHERE, dtype=case.dtype)
        tiles, row = [], padding
        for run in runs:
            count = run.end - run.first
            asked = self.queries[run.sequence][run.first : run.end].flatten(1)
            qkv[row : row + count, : asked.shape[1]] = asked
            tiles += [(row, count, run.first, starts[run.sequence]), *[PADDING] * padding]
            row += count + padding
        tile_of, out = torch.tensor(tiles, dtype=torch.int32), torch.full((rows, asked.shape[1]), NOWHERE)
        out = out.to(case.dtype)
        most = max(most_rows, *(run.end - run.first for run in runs))
        if prompt:
            attention.prompt(qkv, tile_of, tables, pool, out, most)
        else:
            workspace = attention.workspace(
                rows, len(tiles), most, max(places, len(tiles)) if places else 1000, torch.device("cpu")
            )
            workspace.partial.fill_(NOWHERE), workspace.weights.fill_(NOWHERE)
            workspace.items.fill_(-1), workspace.row_items.fill_(-1)
            attention.list_work(tile_of, workspace)
            attention.generated(qkv, tables, pool, workspace, out)
        results, row = [], padding
        expected_padding = torch.ones(rows, dtype=torch.bool)
        for run in runs:
            count = run.end - run.first
            results.append(out[row : row + count].unflatten(1, (case.heads, case.head_dim)).clone())
            expected_padding[row : row + count] = False
            row += count + padding
        untouched = out[expected_padding]
        assert bool(untouched.isnan().all() if prompt else (untouched == 0).all()), "of padding rows"
        return results

    def pool(
        self, runs: Sequence[Run], bad: Sequence[tuple[int, int]] = ()
    ) -> tuple[Segment, Tensor, dict[int, int]]:
        """The second of two layers; each sequence as far as it has come, its blocks anywhere."""
        case, ends = self.case, {}
        for run in runs:
            ends[run.sequence] = max(ends.get(run.sequence, 0), run.end)
        counts = {sequence: -(-end // case.block_size) for sequence, end in ends.items()}
        total = sum(counts.values())
        order = torch.randperm(total + 2, generator=self.generator)[:total].to(torch.int32)
        cells = torch.full(
            (total + 2, 4, case.block_size, case.kv_heads, case.head_dim), NOWHERE, dtype=case.dtype
        )
        starts: dict[int, int] = {}
        pieces: list[Tensor] = [torch.full((3,), total, dtype=torch.int32)]
        for sequence, blocks in zip(counts, order.split(list(counts.values())), strict=True):
            starts[sequence] = sum(map(len, pieces))
            pieces.append(blocks)
            at = torch.arange(ends[sequence])
            where = blocks.long()[at // case.block_size], at % case.block_size
            cells[where[0], 2, where[1]] = self.keys[sequence][: ends[sequence]]
            cells[where[0], 3, where[1]] = self.values[sequence][: ends[sequence]]
            for other, position in bad:
                if other == sequence and position < ends[sequence]:
                    cells[blocks[position // case.block_size], 2:, position % case.block_size] = NOWHERE
        pool = cells.flatten(1)
        size = pool.shape[1] // 4
        segment = Segment(pool, 2 * size, 3 * size)
        if case.kv_dtype is not None:
            elements, scales = (part.flatten(1).view(torch.uint8) for part in scaled(cells, case.kv_dtype))
            count = 4 * case.block_size * case.kv_heads
            first = size * 2 + count // 2  # both in pairs of bytes
            segment = Segment(torch.cat((elements, scales), 1), 2 * size, 3 * size, first, first + count // 4)
        return segment, torch.cat(pieces), starts

    def expected(self, run: Run) -> Tensor:
        """In float64, `[rows, heads, head_dim]`."""
        case = self.case
        query = self.queries[run.sequence][run.first : run.end].double()
        key, value = (
            x[run.sequence][: run.end].double().repeat_interleave(case.group, 1)
            for x in (self.keys, self.values)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * (case.scale or case.head_dim**-0.5)
        if case.soft_cap:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        distance = torch.arange(run.first, run.end)[:, None] - torch.arange(run.end)
        is_seen = (distance >= 0) & ((distance < case.window) if case.window else True)
        weights = torch.softmax(scores.masked_fill(~is_seen, -torch.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, value)
