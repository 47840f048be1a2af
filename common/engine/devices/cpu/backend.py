"""The CPU backend: oneDNN products on reordered weights, fused kernels for all that lies between.

Owns how weights lie (blocked for oneDNN, once, the plain copy dropped), how many rows a product
takes, and the numerics class of this machine. The kernels are in kernels.py.

Why the rule holds: oneDNN may choose another kernel, with another order of summation, for another
number of rows; so prompt rows always go in calls of exactly `prompt_rows`, and generated rows in
calls of at most `generated_rows` within which `settle` has seen that the number of rows makes no
difference on this machine for any of the model's shapes. All other kernels are ours and compute a
row from that row alone.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.cpu import kernels, lanes, numba_runtime
from common.engine.devices.device import HeadShape, Linear
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import RowPlan, Rows
from common.errors import ConfigError, UnsupportedModel

KERNELS_VERSION = 2  # raise it when a change of kernels.py changes bits

ROWS_A_THREAD = 4  # of attention, from which on a row is one piece of work; below, each key-value head is

# The overload itself: looking it up costs microseconds at each of hundreds of calls a step.
_PRODUCT = torch.ops.mkldnn._linear_pointwise.default

_ELEMENT = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}


class _OneDnnLinear:
    """weight `[out, in]`, reordered once into oneDNN's blocked layout."""

    def __init__(self, backend: CpuBackend, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._backend = backend
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self._bias = bias

    def product(self, x: Tensor) -> Tensor:
        out: Tensor = _PRODUCT(x, self._weight, self._bias, "none", [], "")
        return out

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        return self._backend.by_slices(self, x, padded_generated)


class _PlainLinear:
    """A head on an embedding that must stay readable by rows: oneDNN on the plain layout."""

    def __init__(self, backend: CpuBackend, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._backend = backend
        self._weight = weight

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        return self._backend.by_slices(self, x, padded_generated)


class CpuBackend:
    """See `Backend`. `threads` is the number of cores this process computes on."""

    def __init__(self, dtype: torch.dtype, threads: int, prompt_rows: int = 128) -> None:
        if dtype not in _ELEMENT:
            raise ConfigError(f"dtype {dtype} does not run on CPU; use bfloat16 or float32", param="dtype")
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ConfigError("this CPU has no bfloat16 products; use dtype float32", param="dtype")
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.threads = threads
        self.row_plan = RowPlan(prompt_rows, 32, 32, query_tile=kernels.QUERY_TILE)
        self._element = _ELEMENT[dtype]
        self._shapes: set[tuple[str, int, int, bool]] = set()  # kind, in, out, with bias
        self._products = ""  # digest of what the products gave, see `settle`
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
                f"torch-{torch.__version__.partition('+')[0]}",
                f"kernels-{KERNELS_VERSION}",
                f"products-{self._products}",
            )
        )

    def settle(self) -> None:
        """Find the smallest step of generated rows whose every count gives the same bits.

        Called once all weights are prepared. Each shape is tried with a product of its own that
        is zero but for the order of summation, so that another order shows in every element,
        not in one of thousands. 32 rows always serve, being the one exact size. What the products
        gave becomes part of the class: a library, a processor or a variable of the environment
        that leads to another order of summation leads to another class.
        """
        most = self.row_plan.generated_rows
        same = np.ones(most + 1, dtype=bool)
        digest = hashlib.blake2b(digest_size=6)
        for shape in sorted(self._shapes):
            rows, linear = self._cancelling_product(*shape)
            self._check_prompt_rows(rows, linear, digest)
            x = rows[:most]
            whole = linear.product(x)
            digest.update(_bytes(whole))
            for count in range(1, most):
                if same[count]:
                    last = x[most - count :].clone()  # other rows than the first, to see both
                    same[count] = torch.equal(linear.product(x[:count]), whole[:count])
                    same[count] &= torch.equal(linear.product(last), whole[most - count :])
        multiple = next(m for m in (1, 2, 4, 8, 16, 32) if same[m : most + 1 : m].all())
        self.row_plan = dataclasses.replace(self.row_plan, generated_multiple=multiple)
        self._products = digest.hexdigest()

    def _check_prompt_rows(
        self, x: Tensor, linear: _OneDnnLinear | _PlainLinear, digest: hashlib.blake2b
    ) -> None:
        """A row of a prompt's product must not depend on its place among the others."""
        if isinstance(linear, _PlainLinear):
            return  # a head, whose rows all count as generated
        whole = linear.product(x)
        if not torch.equal(linear.product(x.roll(1, 0)), whole.roll(1, 0)):
            raise ConfigError(
                f"on this machine a product of {len(x)} rows depends on their order, so that no "
                "result could be repeated; use kernels reference",
                param="kernels",
            )
        digest.update(_bytes(whole))

    def _cancelling_product(
        self, kind: str, in_features: int, out_features: int, biased: bool
    ) -> tuple[Tensor, _OneDnnLinear | _PlainLinear]:
        """Inputs for a prompt's call, and a weight, whose products cancel in pairs of columns that
        lie anywhere. A bias is as small as what is left, so that it matters when it is added."""
        generator = torch.Generator().manual_seed(0)
        half = in_features // 2
        one, other = torch.randperm(in_features, generator=generator)[: 2 * half].view(2, half)
        rows = self.row_plan.prompt_rows
        x = torch.zeros(rows, in_features, dtype=self.dtype)
        weight = torch.zeros(out_features, in_features, dtype=self.dtype)
        x[:, one] = torch.randn(rows, half, generator=generator).to(self.dtype)
        weight[:, one] = torch.randn(out_features, half, generator=generator).to(self.dtype)
        x[:, other], weight[:, other] = x[:, one], -weight[:, one]
        if kind == _PlainLinear.__name__:
            return x, _PlainLinear(self, weight)
        bias = None
        if biased:
            bias = (torch.randn(out_features, generator=generator) * 2.0**-20).to(self.dtype)
        return x, _OneDnnLinear(self, weight, bias)

    def check(self, shape: HeadShape) -> None:
        if shape.head_dim % 4:
            raise UnsupportedModel(f"head_dim {shape.head_dim} is not a multiple of 4", param="head_dim")

    def enter_thread(self) -> None:
        numba_runtime.set_num_threads(self.threads)

    def tensor(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).contiguous()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        self._shapes.add((_OneDnnLinear.__name__, *weight.shape[::-1], bias is not None))
        return _OneDnnLinear(self, self.tensor(weight), None if bias is None else self.tensor(bias))

    def tied_linear(self, embedding: Tensor) -> Linear:
        self._shapes.add((_PlainLinear.__name__, *embedding.shape[::-1], False))
        return _PlainLinear(self, embedding)

    def by_slices(self, linear: _OneDnnLinear | _PlainLinear, x: Tensor, padded_generated: int) -> Tensor:
        """The product of all rows, in the calls that the row plan allows."""
        if self._is_one_call(x.shape[0], padded_generated):
            return linear.product(x)
        out = torch.empty(x.shape[0], linear.out_features, dtype=self.dtype)
        for part in self.row_plan.slices(x.shape[0], padded_generated):
            out[part] = linear.product(x[part])
        return out

    def _is_one_call(self, rows: int, padded_generated: int) -> bool:
        """Whether the row plan takes all rows at once: nothing is cut, nothing is copied."""
        plan = self.row_plan
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
        assert isinstance(gate_up, _OneDnnLinear)
        assert isinstance(down, _OneDnnLinear)
        if self._is_one_call(x.shape[0], padded_generated):
            return self._gated_mlp(x, gate_up, down)
        out = torch.empty(x.shape[0], down.out_features, dtype=self.dtype)
        for part in self.row_plan.slices(x.shape[0], padded_generated):
            out[part] = self._gated_mlp(x[part], gate_up, down)  # one at a time stays in the cache
        return out

    def _gated_mlp(self, x: Tensor, gate_up: _OneDnnLinear, down: _OneDnnLinear) -> Tensor:
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
        pool, slab = cache.elements.data_ptr(), cache.slab_elements
        key_offset, value_offset = cache.offset(layer, "k"), cache.offset(layer, "v")
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
            self._element,
        )
        out = torch.empty(rows.num_rows, heads * shape.head_dim, dtype=self.dtype)
        quarter = (0,) * (shape.head_dim // 4)
        scale = shape.head_dim**-0.5
        filled = rows.num_generated
        if rows.num_generated:
            kernels.attend_generated(
                qkv.data_ptr(),
                qkv.shape[1],
                out.data_ptr(),
                rows.generated_tables.data_ptr(),
                rows.generated_tables.shape[1],
                rows.generated_lengths.data_ptr(),
                pool,
                key_offset,
                value_offset,
                slab,
                block_size,
                rows.num_generated,
                heads,
                kv_heads,
                1 if rows.num_generated >= ROWS_A_THREAD * self.threads else kv_heads,
                (0,) * lanes.heads_together(heads // kv_heads, shape.head_dim, cache.dtype.itemsize),
                quarter,
                shape.window,
                scale,
                self._element,
            )
        out[filled : rows.padded_generated] = 0
        if rows.prompt_chunks:
            kernels.attend_prompt(
                qkv.data_ptr(),
                qkv.shape[1],
                out.data_ptr(),
                rows.prompt_tables.data_ptr(),
                rows.prompt_tables.shape[1],
                rows.prompt_tiles.data_ptr(),
                pool,
                key_offset,
                value_offset,
                slab,
                block_size,
                rows.prompt_tiles.shape[0],
                heads,
                kv_heads,
                quarter,
                shape.window,
                scale,
                self._element,
            )
            last, count, _ = rows.prompt_chunks[-1]
            out[last + count :] = 0
        return out


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
