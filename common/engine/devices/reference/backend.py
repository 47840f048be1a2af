"""The reference backend: plain torch operations, on any device.

Owns clarity: it is what the fast backends are compared with. It does not keep the numerics rule: torch
chooses a product's kernel by the size of the batch. So its class is nobody else's, not even that of the same
device in another process, and two nodes with it hand nothing over to each other.
"""

from __future__ import annotations

import secrets

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.devices.device import HeadShape, Linear
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import RowPlan, Rows
from common.engine.devices.scaled_rows import scaled, unscaled
from common.kv_layout import SCALED_DTYPES, UNREPEATABLE


class _PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class ReferenceBackend:
    """See `Backend`; `dtype` is that of weights and activations."""

    kv_dtypes = SCALED_DTYPES
    row_plan = RowPlan(prompt_rows=1, generated_rows=1, generated_multiple=1, query_tile=1 << 20)

    def __init__(self, device: torch.device, dtype: torch.dtype, name: str) -> None:
        """`name` says which product the device is."""
        self.device = device
        self.dtype = dtype
        described = (
            f"reference/{UNREPEATABLE}-{secrets.token_hex(8)}/{name}/{dtype}/torch-{torch.__version__}"
        )
        self._class = described.replace(" ", "-")

    @property
    def numerics_class(self) -> str:
        return self._class

    def check(self, shape: HeadShape) -> None:
        """Every shape will do."""

    def enter_thread(self) -> None:
        """Nothing is kept per thread."""

    def memory(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _PlainLinear(weight, bias)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self.linear(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Linear:
        return _PlainLinear(embedding, None)

    def prepare(self, rows: Rows) -> Rows:
        return rows.to(self.device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += delta
        return self.rms_norm(residual, weight, eps)

    def gated_mlp(self, x: Tensor, gate_up: Linear, down: Linear, padded_generated: int) -> Tensor:
        gate, up = gate_up(x, padded_generated).chunk(2, dim=-1)
        return down(F.silu(gate) * up, padded_generated)

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
        sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        heads = qkv.view(rows.num_rows, sum(sizes), shape.head_dim)
        query, key, value = torch.split(heads, list(sizes), dim=1)
        if norms is not None:
            query = self.rms_norm(query, norms[0], eps)
            key = self.rms_norm(key, norms[1], eps)
        query = rotate(query, rows.positions, rope, shape.rotary_dim)
        key = rotate(key, rows.positions, rope, shape.rotary_dim)
        _keep(cache, layer, "k", key, rows.slots)
        _keep(cache, layer, "v", value, rows.slots)
        keys, values = cache.view(layer, "k"), cache.view(layer, "v")
        scales = cache.scales(layer, "k"), cache.scales(layer, "v")
        out = torch.zeros_like(query)
        for first_row, count, position, table_start in rows.tiles.tolist():
            table = rows.tables[table_start:]
            together = 1 if first_row < rows.num_generated else count
            for done in range(0, count, together):
                here = slice(first_row + done, first_row + done + together)
                out[here] = _attend(query[here], keys, values, table, position + done, shape.window, *scales)
        return out.reshape(rows.num_rows, -1)

    def settle(self) -> None:
        """Nothing is chosen at run time."""


def rotate(x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], rotary_dim: int) -> Tensor:
    """x `[rows, heads, head_dim]`; the first `rotary_dim` dimensions turn, halves paired."""
    cosines, sines = (table[positions].unsqueeze(1) for table in rope)
    low, high = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((low * cosines - high * sines, high * cosines + low * sines), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def store(pool: Tensor, x: Tensor, slots: Tensor) -> None:
    """pool `[blocks, block_size, …]`, x `[rows, …]`; rows with a negative slot are padding."""
    stored = slots >= 0
    slots, x = slots[stored], x[stored]
    block_size = pool.shape[1]
    pool[slots // block_size, slots % block_size] = x


def _keep(cache: KVCache, layer: int, kind: str, x: Tensor, slots: Tensor) -> None:
    """Store x `[rows, heads, head_dim]` as the layout of the cache says."""
    pool, scales_of = cache.view(layer, kind), cache.scales(layer, kind)
    if scales_of is None:
        store(pool, x, slots)
        return
    elements, scales = scaled(x, pool.dtype)
    store(pool.view(torch.uint8), elements.view(torch.uint8), slots)
    store(scales_of, scales, slots)


def _read(pool: Tensor, scales: Tensor | None, blocks: Tensor, end: int) -> Tensor:
    """The first `end` positions of a sequence, `[heads, end, head_dim]`; float32 where they were scaled."""
    if scales is None:
        rows = pool[blocks]
    else:
        rows = unscaled(pool.view(torch.uint8)[blocks].view(pool.dtype), scales[blocks])
    return rows.flatten(0, 1)[:end].transpose(0, 1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    position: int,
    window: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Rows at `position`, `position + 1`, … of one sequence: query `[rows, heads, head_dim]`."""
    rows = query.shape[0]
    end = position + rows
    blocks = table[: -(-end // keys.shape[1])].long()
    k, v = _read(keys, key_scales, blocks, end), _read(values, value_scales, blocks, end)
    here = torch.arange(position, end, device=query.device).unsqueeze(1)
    there = torch.arange(end, device=query.device).unsqueeze(0)
    visible = there <= here
    if window:
        visible &= there > here - window
    q = query.to(k.dtype).transpose(0, 1)
    attended = F.scaled_dot_product_attention(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=visible, enable_gqa=True
    )
    return attended.squeeze(0).transpose(0, 1).to(query.dtype)
