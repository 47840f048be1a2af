"""The CPU backend: products of matrices (products.py), fused kernels for all that lies between (kernels.py).

Owns the numerics class of this machine, and in which calls products are made. Why the rule holds: a row of a
product depends on that row alone, which `settle` has seen, and all other kernels compute a row from that row
alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.engine.devices.cpu import attention, kernels, numba_runtime, scaled_rows, tiles
from common.engine.devices.cpu.products import ELEMENT, OneDnnProducts, OwnProducts, Product, Products
from common.engine.devices.device import HeadShape, Linear
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import RowPlan, Rows
from common.errors import ConfigError, UnsupportedModel
from common.kv_layout import ONE_CLASS, SCALED_DTYPES

KERNELS_VERSION = 4  # raise it when a change of a kernel, or of how it is compiled, changes bits


class _Linear:
    """Implements `Linear`: a product in the calls that the row plan allows."""

    def __init__(self, backend: CpuBackend, prepared: Product) -> None:
        self._backend = backend
        self.prepared = prepared

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        return self._backend.by_slices(self.prepared, x, padded_generated)


class CpuBackend:
    """See `Backend`. `threads` is the number of cores this process computes on."""

    kv_dtypes = SCALED_DTYPES

    def __init__(self, dtype: torch.dtype, threads: int, products: Products | None = None) -> None:
        """`products`: those that are faster on this machine, unless others are given."""
        if dtype not in ELEMENT:
            raise ConfigError(f"dtype {dtype} does not run on CPU; use bfloat16 or float32", param="dtype")
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.threads = threads
        self._element = ELEMENT[dtype]
        self._products = products or _fastest(dtype)
        self.row_plan: RowPlan = self._products.row_plan
        self._digest = ""  # of what the products gave, see `Products.settle`
        self.enter_thread()

    @property
    def numerics_class(self) -> str:
        plan = self.row_plan
        return "/".join(
            (
                "cpu",
                numba_runtime.target(),
                torch.backends.cpu.get_cpu_capability().replace(" ", ""),
                "amx" if torch.cpu._is_amx_tile_supported() else "no-amx",
                str(self.dtype).removeprefix("torch."),
                f"threads-{self.threads}",
                f"rows-{plan.prompt_rows}-{plan.generated_rows}x{plan.generated_multiple}",
                *((ONE_CLASS,) if plan.takes_any else ()),
                f"torch-{torch.__version__.partition('+')[0]}",
                f"kernels-{KERNELS_VERSION}",
                f"{self._products.name}-{self._digest}",
            )
        )

    def settle(self) -> None:
        """Called once all weights are prepared. What the products gave becomes part of the class: a library,
        a processor or a variable of the environment that leads to another order of summation leads to
        another class."""
        self._digest = self._products.settle()
        self.row_plan = self._products.row_plan

    def check(self, shape: HeadShape) -> None:
        if shape.head_dim % 4:
            raise UnsupportedModel(f"head_dim {shape.head_dim} is not a multiple of 4", param="head_dim")

    def enter_thread(self) -> None:
        numba_runtime.set_num_threads(self.threads)

    def memory(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _Linear(self, self._products.linear(weight, bias))

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self.linear(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Linear:
        return _Linear(self, self._products.tied_linear(embedding))

    def by_slices(self, prepared: Product, x: Tensor, padded_generated: int) -> Tensor:
        """The product of all rows, in the calls that the row plan allows."""
        if self._is_one_call(x.shape[0], padded_generated):
            return prepared.product(x)
        out = torch.empty(x.shape[0], prepared.out_features, dtype=self.dtype)
        for part in self.row_plan.slices(x.shape[0], padded_generated):
            out[part] = prepared.product(x[part])
        return out

    def _is_one_call(self, rows: int, padded_generated: int) -> bool:
        """Whether the row plan takes all rows at once: nothing is cut, nothing is copied."""
        plan = self.row_plan
        if plan.takes_any:
            return True
        if padded_generated:
            return rows == padded_generated <= plan.generated_rows
        return rows == plan.prompt_rows

    def prepare(self, rows: Rows) -> Rows:
        return rows

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        kernels.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps, self._element)
        return out

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(residual)
        rows, width = residual.shape
        kernels.add_rms_norm(
            delta.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            eps,
            self._element,
        )
        return out

    def gated_mlp(self, x: Tensor, gate_up: Linear, down: Linear, padded_generated: int) -> Tensor:
        assert isinstance(gate_up, _Linear)
        assert isinstance(down, _Linear)
        first, second, rows = gate_up.prepared, down.prepared, x.shape[0]
        if self._is_one_call(rows, padded_generated) and rows <= self._products.rows_between:
            return self._gated_mlp(x, first, second)
        out = torch.empty(rows, second.out_features, dtype=self.dtype)
        for part in self._parts(rows, padded_generated):
            out[part] = self._gated_mlp(x[part], first, second)  # one at a time stays in the cache
        return out

    def _parts(self, rows: int, padded_generated: int) -> Iterator[slice]:
        if not self.row_plan.takes_any:
            return self.row_plan.slices(rows, padded_generated)
        size = self._products.rows_between
        return (slice(start, start + size) for start in range(0, rows, size))

    def _gated_mlp(self, x: Tensor, gate_up: Product, down: Product) -> Tensor:
        both = gate_up.product(x)
        rows, width = x.shape[0], down.in_features
        gated = torch.empty(rows, width, dtype=self.dtype)
        kernels.silu_mul(both.data_ptr(), gated.data_ptr(), rows, width, self._element)
        return down.product(gated)

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
        pool, slab = cache.slabs.data_ptr(), cache.layout.slab_bytes
        key_offset, value_offset = cache.offset_bytes(layer, "k"), cache.offset_bytes(layer, "v")
        form = scaled_rows.FORMATS.get(cache.view(layer, "k").dtype, scaled_rows.PLAIN)
        scales = (
            (cache.offset_bytes(layer, "k_scale"), cache.offset_bytes(layer, "v_scale")) if form else (0, 0)
        )
        block_size = cache.layout.block_size
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        q_norm, k_norm = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        kernels.rotate_and_store(
            qkv.data_ptr(),
            rows.positions.data_ptr(),
            rows.slots.data_ptr(),
            rope[0].data_ptr(),
            rope[1].data_ptr(),
            q_norm,
            k_norm,
            pool,
            key_offset,
            value_offset,
            slab,
            block_size,
            rows.num_rows,
            heads,
            kv_heads,
            shape.head_dim,
            shape.rotary_dim,
            eps,
            *scales,
            form,
            self._element,
        )
        out = torch.empty(rows.num_rows, heads * shape.head_dim, dtype=self.dtype)
        attention.attend(
            qkv.data_ptr(),
            qkv.shape[1],
            out.data_ptr(),
            rows.tables.data_ptr(),
            rows.tiles.data_ptr(),
            rows.tiles.shape[0],
            pool,
            key_offset,
            value_offset,
            slab,
            block_size,
            heads,
            kv_heads,
            shape.window,
            shape.head_dim**-0.5 * attention.LOG2_E,
            self.threads,
            *attention.together(heads // kv_heads, shape.head_dim),
            (0,) * (shape.head_dim // 4),
            tiles.PAIR_PRODUCTS,
            *scales,
            form,
            self._element,
        )
        if not self.row_plan.takes_any:
            _clear_padding(out, rows)
        return out


def _clear_padding(out: Tensor, rows: Rows) -> None:
    out[rows.num_generated : rows.padded_generated] = 0
    if rows.prompt_chunks:
        last, count, _ = rows.prompt_chunks[-1]
        out[last + count :] = 0


def _fastest(dtype: torch.dtype) -> Products:
    """Tiles of bfloat16 are oneDNN's alone."""
    has_tiles: bool = torch.cpu._is_amx_tile_supported()
    return OneDnnProducts(dtype) if has_tiles and dtype == torch.bfloat16 else OwnProducts(dtype)
