"""Attention of a step's rows, launched: norm, rotation and store; generated rows; prompts.

Owns how many lines (query heads at a position) a program takes, on which card, and the memory between two
kernels. The order of every sum is the kernels' own (kernels/attention.py) and the same for all launches: a
row's bits depend on its position, the window and the head's shape, so that generated rows and prompts are one
class. Between them a product must be made by one family of the tensor cores' instructions, which sum in
different ways: hence 64 lines and more where the card multiplies by warp groups, and any number elsewhere.

Nothing here waits, or reads what is on the device: all of it may be captured.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from common.engine.devices.cuda.kernels.attention import prompt_kernel
from common.engine.devices.cuda.kernels.generated import (
    RECORD,
    combine_kernel,
    generated_kernel,
    list_work_kernel,
)
from common.engine.devices.cuda.kernels.rope_store import rope_store_kernel
from common.engine.devices.cuda.launch import Launch, power_of_two
from common.engine.devices.device import HeadShape
from common.engine.devices.kv_cache import KVCache
from common.errors import ConfigError, UnsupportedModel

SPLIT = 256  # positions: a unit of work of a generated row, and of the order of every sum
LOG2_E = 1.4426950408889634

MANTISSAS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # bits; which KV in 8 bits there is

_SCALE_BYTES = 2
_STEP_ELEMENTS = 8 << 10  # of the keys that a program multiplies at once; without tensor cores a quarter
_LARGEST_HEAD = 256
_LARGEST_GROUP = 64  # query heads that share keys
_HEADS_OF_A_PROGRAM = 8  # of one row, normed, turned and stored together
_ROWS_OF_A_PROGRAM = 8  # whose items are looked for together
_MOST_TILES = 4096
_ITEMS_AHEAD = 4  # read before they are joined
_MUCH_SHARED = (80, 90, 100)  # cards whose multiprocessors have twice what others have


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One layer's keys and values in the pool: `elements` `[blocks, slab_elements]` in the pool's dtype, and
    where in a slab each begins, in elements. Of 8 bits (scaled_rows.py) elements are bytes, uint8, and scales
    begin where `key_scales` and `value_scales` say, in pairs of bytes."""

    elements: Tensor
    keys: int
    values: int
    key_scales: int = 0
    value_scales: int = 0

    @classmethod
    def of(cls, cache: KVCache, layer: int) -> Segment:
        def starts(size: int, *kinds: str) -> list[int]:
            return [cache.offset_bytes(layer, kind) // size for kind in kinds]

        dtype = cache.view(layer, "k").dtype
        if dtype in MANTISSAS:
            return cls(cache.slabs, *starts(1, "k", "v"), *starts(_SCALE_BYTES, "k_scale", "v_scale"))
        return cls(cache.slabs.view(dtype), *starts(dtype.itemsize, "k", "v"))


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """What lies between the kernels of generated rows. Filled anew in each step: `items`, `row_items` and
    `count` by `list_work`, once for all layers; `partial` and `weights` by each layer."""

    items: Tensor  # int32 [places, RECORD]
    row_items: Tensor  # int32 [rows, 4]
    count: Tensor  # int32 [1]
    partial: Tensor  # float32 [places, kv_heads, most_rows * group, head_dim]
    weights: Tensor  # float32 [places, kv_heads, most_rows * group, 2]
    most_rows: int  # of a tile

    @property
    def rows(self) -> int:
        return self.row_items.shape[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """How a program of attention is made; leaves no trace in the bits."""

    lines: int
    num_warps: int
    num_stages: int
    at_once: int  # programs of a multiprocessor


def check_heads(shape: HeadShape) -> None:
    """`UnsupportedModel` for heads that the kernels cannot compute."""
    if shape.head_dim % 8 or not 16 <= shape.head_dim <= _LARGEST_HEAD:
        raise UnsupportedModel(
            f"head_dim {shape.head_dim} is no multiple of 8 from 16 to {_LARGEST_HEAD}", param="head_dim"
        )
    if shape.rotary_dim % 2 or not 2 <= shape.rotary_dim <= shape.head_dim:
        raise UnsupportedModel(
            f"{shape.rotary_dim} of {shape.head_dim} dimensions cannot turn by pairs", param="rotary_dim"
        )
    if shape.num_kv_heads < 1 or shape.num_heads % shape.num_kv_heads:
        raise UnsupportedModel(
            f"{shape.num_heads} heads do not share {shape.num_kv_heads} evenly", param="num_key_value_heads"
        )
    if shape.num_heads // shape.num_kv_heads > _LARGEST_GROUP:
        raise UnsupportedModel(
            f"{shape.num_heads // shape.num_kv_heads} heads share one; {_LARGEST_GROUP} can",
            param="num_key_value_heads",
        )
    if shape.window < 0:
        raise UnsupportedModel(f"a window of {shape.window} positions", param="sliding_window")


def places_for(tiles: int, pool_tokens: int) -> int:
    """As many places as all sequences together need while none shares a block: with so many, every split
    is computed by a program of its own."""
    return 2 * tiles + pool_tokens // SPLIT


class Attention:
    """Of the layers whose heads have one shape. Makes no memory but in `workspace`.

    In all calls: qkv `[rows, (heads + 2 * kv_heads) * head_dim]`, whose rows are contiguous; out `[rows,
    heads * head_dim]` contiguous; tiles int32 `[tiles, 4]`, of first row, rows (0: padding), first position,
    and where in `tables` its blocks begin; tables int32 flat. All on the device, in one dtype but for these
    and a pool of 8 bits.
    """

    def __init__(
        self,
        shape: HeadShape,
        dtype: torch.dtype,
        block_size: int,
        *,
        capability: int,
        multiprocessors: int,
        scale: float = 0.0,
        soft_cap: float = 0.0,
        split: int = SPLIT,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`capability` times ten: 80, 90. `scale` 0: one by the root of head_dim. `soft_cap` 0: none.
        `split` is part of the order of a sum. `kv_dtype`: one of `MANTISSAS`, where segments are stored in
        8 bits. `UnsupportedModel`, `ConfigError`."""
        check_heads(shape)
        if block_size < 1 or block_size & (block_size - 1):
            raise ConfigError(
                f"a block of {block_size} positions: on a GPU it is a power of two", param="block_size"
            )
        self.shape, self.dtype, self.block_size = shape, dtype, block_size
        self.multiprocessors = multiprocessors
        self._capability = capability
        self.kv_dtype = kv_dtype
        self._mantissa = 0 if kv_dtype is None else MANTISSAS[kv_dtype]
        self._group = shape.num_heads // shape.num_kv_heads
        self._width = max(16, power_of_two(shape.head_dim))
        elements = _STEP_ELEMENTS if dtype.itemsize == 2 else _STEP_ELEMENTS // 4
        self.step = max(16, min(64, elements // self._width))  # positions; part of the order
        assert split % self.step == 0, "a split is made of whole steps"
        self._split = split
        scale = scale or shape.head_dim**-0.5
        self._scale = scale * LOG2_E if not soft_cap else 2 * LOG2_E * scale / soft_cap
        self._soft_cap = soft_cap * LOG2_E
        self._constants = {
            "WINDOWED": shape.window > 0,
            "CAPPED": soft_cap > 0,
            "GROUP": self._group,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "BLOCK_SHIFT": block_size.bit_length() - 1,
            "KEYS": self.step,
            "LEVELS": self.step.bit_length() - 1,
            "SPLIT_STEPS": split // self.step,
            "WIDTH": self._width,
            "MANTISSA": self._mantissa,
        }

    @property
    def query_rows(self) -> int:
        """Positions of a prompt that one program takes: of how many a tile is best made."""
        return max(1, self.prompt_tiling.lines // self._group)

    def store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        segment: Segment,
        rope: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> None:
        """Norm queries and keys (with `norms`, of each `[head_dim]`), turn both, the queries in place, and
        store keys and values. positions, slots int64 `[rows]`; a slot is block * block_size + offset, or
        below 0 and stored nowhere. rope float32 `[positions, rotary_dim / 2]` twice."""
        if not (rows := qkv.shape[0]):
            return
        self.store_launch(norms is not None)(
            self.store_grid(rows),
            qkv,
            positions,
            slots,
            segment.elements,
            *rope,
            *(norms or (qkv, qkv)),
            qkv.stride(0),
            segment.elements.stride(0),
            segment.keys,
            segment.values,
            segment.key_scales,
            segment.value_scales,
            eps,
        )

    def store_grid(self, rows: int) -> tuple[int, int]:
        heads = self.shape.num_heads + 2 * self.shape.num_kv_heads
        return rows, -(-heads // _HEADS_OF_A_PROGRAM)

    def partial_elements(self, most_rows: int, places: int) -> int:
        """float32 elements that `workspace` needs for partial results."""
        return places * self.shape.num_heads * most_rows * (self.shape.head_dim + 2)

    def workspace(
        self,
        rows: int,
        tiles: int,
        most_rows: int,
        places: int,
        device: torch.device,
        *,
        partials: Tensor | None = None,
    ) -> Workspace:
        """For `tiles` tiles of at most `most_rows` rows each, among `rows` rows. With `places`, at least
        `tiles`, so many splits are computed side by side; where there are more, programs take several of one
        tile. `partials` is memory for them, float32, that nobody else uses on this stream meanwhile."""
        assert 0 < tiles <= _MOST_TILES, f"{tiles} tiles"
        assert places >= tiles, f"{places} places for {tiles} tiles"
        needed = self.partial_elements(most_rows, places)
        if partials is None:
            partials = torch.empty(needed, dtype=torch.float32, device=device)
        lines = (places, self.shape.num_kv_heads, most_rows * self._group)
        border = math.prod(lines) * self.shape.head_dim
        return Workspace(
            items=torch.empty((places, RECORD.value), dtype=torch.int32, device=device),
            row_items=torch.empty((rows, 4), dtype=torch.int32, device=device),
            count=torch.empty(1, dtype=torch.int32, device=device),
            partial=partials[:border].view(*lines, self.shape.head_dim),
            weights=partials[border:needed].view(*lines, 2),
            most_rows=most_rows,
        )

    def list_work(self, tiles: Tensor, workspace: Workspace) -> None:
        """Once a step, before `generated` of all layers with this shape."""
        count, rows = tiles.shape[0], workspace.rows
        assert count <= workspace.items.shape[0], f"{workspace.items.shape[0]} places for {count} tiles"
        self.list_launch(count)(
            (max(count, -(-rows // _ROWS_OF_A_PROGRAM)),),
            tiles,
            workspace.items,
            workspace.row_items,
            workspace.count,
            count,
            rows,
            workspace.items.shape[0],
            self.shape.window,
        )

    def generated(
        self, qkv: Tensor, tables: Tensor, segment: Segment, workspace: Workspace, out: Tensor
    ) -> None:
        """The rows of the tiles that `list_work` saw, of at most `workspace.most_rows` each; zeros for the
        other ones of the first `workspace.rows`."""
        tiling = self.generated_tiling(workspace.most_rows)
        self.generated_launch(workspace.most_rows)(
            (self.multiprocessors * tiling.at_once,),
            qkv,
            segment.elements,
            tables,
            workspace.items,
            workspace.count,
            workspace.partial,
            workspace.weights,
            *self._numbers(qkv, segment),
        )
        self.combine_launch(workspace.most_rows)(
            (workspace.rows, self.shape.num_kv_heads),
            workspace.partial,
            workspace.weights,
            workspace.row_items,
            out,
        )

    def prompt(
        self, qkv: Tensor, tiles: Tensor, tables: Tensor, segment: Segment, out: Tensor, most_rows: int
    ) -> None:
        """The rows of the tiles, of at most `most_rows` each; other ones stay as they are."""
        if not tiles.shape[0]:
            return
        launch = self.prompt_launch(most_rows)
        launch(
            (tiles.shape[0] * launch.constants["LINE_TILES"], self.shape.num_kv_heads),
            qkv,
            segment.elements,
            tables,
            tiles,
            out,
            *self._numbers(qkv, segment),
        )

    def _numbers(self, qkv: Tensor, segment: Segment) -> tuple[float, ...]:
        return (
            qkv.stride(0),
            segment.elements.stride(0),
            segment.keys,
            segment.values,
            segment.key_scales,
            segment.value_scales,
            self.shape.window,
            self._scale,
            self._soft_cap,
        )

    @property
    def _by_warp_groups(self) -> bool:
        """Products by `wgmma`, which takes 64 lines at least. Everywhere else by `mma`, which takes 16: on a
        B200 too, with whose own instruction the kernels need more registers than there are."""
        return 90 <= self._capability < 100 and self.dtype.itemsize == 2 and self._width <= 128

    @property
    def prompt_tiling(self) -> Tiling:
        if self.dtype.itemsize > 2:
            return Tiling(16, 8, 1, 1)
        if self._by_warp_groups:
            return Tiling(128, 8, 3, 1)
        widens = self._mantissa and self._capability == 100  # for which that card's code takes more registers
        return Tiling(16 if widens else 32, 8, 2, 1)

    def generated_tiling(self, most_rows: int) -> Tiling:
        if self.dtype.itemsize > 2:
            return Tiling(16, 8, 1, 1)
        if self._by_warp_groups:
            is_plain = most_rows == 1 and self.shape.head_dim == self._width
            return Tiling(64, 4, 2, 2) if is_plain else Tiling(64, 8, 2, 1)
        if most_rows * self._group > 16:
            return Tiling(32, 8, 2, 1)
        num_stages = 3 if self._capability in _MUCH_SHARED else 2
        return Tiling(16, 8, num_stages, 1) if self._mantissa else Tiling(16, 4, num_stages, 2)

    @functools.cache  # noqa: B019  (as many as a model has shapes)
    def store_launch(self, normed: bool) -> Launch:
        shape = self.shape
        return Launch(
            kernel=rope_store_kernel,
            constants={
                "NORMED": normed,
                "NUM_HEADS": shape.num_heads,
                "NUM_KV_HEADS": shape.num_kv_heads,
                "HEAD_DIM": shape.head_dim,
                "ROTARY_DIM": shape.rotary_dim,
                "BLOCK_SHIFT": self.block_size.bit_length() - 1,
                "HEADS": _HEADS_OF_A_PROGRAM,
                "HALF": power_of_two(shape.rotary_dim // 2),
                "REST": power_of_two(max(1, shape.head_dim - shape.rotary_dim)),
                "MANTISSA": self._mantissa,
            },
            num_warps=2,
        )

    @functools.cache  # noqa: B019
    def list_launch(self, tiles: int) -> Launch:
        return Launch(
            kernel=list_work_kernel,
            constants={
                "WINDOWED": self.shape.window > 0,
                "SPLIT": self._split,
                "TILES": power_of_two(tiles),
                "ROWS": _ROWS_OF_A_PROGRAM,
                "AT_ONCE": 128,
            },
            num_warps=4,
        )

    @functools.cache  # noqa: B019
    def generated_launch(self, most_rows: int) -> Launch:
        tiling, lines = self.generated_tiling(most_rows), most_rows * self._group
        return Launch(
            kernel=generated_kernel,
            constants=self._constants
            | {
                "MIXED": most_rows > 1,
                "MOST_LINES": lines,
                "LINE_TILES": -(-lines // tiling.lines),
                "LINES": tiling.lines,
                "STAGES": tiling.num_stages,
            },
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )

    @functools.cache  # noqa: B019
    def combine_launch(self, most_rows: int) -> Launch:
        return Launch(
            kernel=combine_kernel,
            constants={
                "GROUP": self._group,
                "NUM_KV_HEADS": self.shape.num_kv_heads,
                "HEAD_DIM": self.shape.head_dim,
                "MOST_LINES": most_rows * self._group,
                "AHEAD": _ITEMS_AHEAD,
                "LINES": power_of_two(self._group),
                "WIDTH": self._width,
            },
            num_warps=4,
        )

    @functools.cache  # noqa: B019
    def prompt_launch(self, most_rows: int) -> Launch:
        tiling = self.prompt_tiling
        return Launch(
            kernel=prompt_kernel,
            constants=self._constants
            | {
                "LINE_TILES": -(-most_rows * self._group // tiling.lines),
                "LINES": tiling.lines,
                "STAGES": tiling.num_stages,
            },
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
