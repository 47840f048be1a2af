"""The operations of a model on a GPU, by kernels of our own (kernels/).

Owns which kernel computes which rows, and the memory between those of attention. A step of generated rows
alone, filled up to a bucket, goes through the kernels that divide a sequence among programs; any other step
through those of prompts, which give the same bits: if the card shows that they do (attention_proof.py), and
else generated rows always go through the former. Nothing here waits for the device or depends on what is in
its memory, so that graphs may record it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from common.engine.devices.cuda import norms
from common.engine.devices.cuda.attention import Attention, Segment, Workspace, check_heads
from common.engine.devices.cuda.attention_proof import POSITIONS, prove
from common.engine.devices.cuda.card import Card
from common.engine.devices.cuda.products import GpuProducts
from common.engine.devices.cuda.settling import FULL, Proof
from common.engine.devices.cuda.tuning import Tuning
from common.engine.devices.device import HeadShape, Linear
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import RowPlan, Rows
from common.errors import ConfigError
from common.kv_layout import ONE_CLASS
from common.logs import get_logger

log = get_logger("attention")

_PLACES_EACH = 4  # of a multiprocessor, for splits that are computed side by side


class CudaBackend:
    """See `Backend`. For one stream at a time. `most_rows`: of one sequence that are verified at once.
    `kv_dtype`: of 8 bits, in which keys and values are kept (scaled_rows.py); None: in `dtype`."""

    row_plan: RowPlan
    kv_dtypes: tuple[str, ...]

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        card: Card,
        *,
        block_size: int,
        most_rows: int = 1,
        kv_dtype: torch.dtype | None = None,
        proof: Proof = FULL,
        tuning: Tuning | None = None,
        proven_positions: int = POSITIONS,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(f"a GPU does not compute in {dtype}", param="dtype")
        self.device, self.dtype, self._card = device, dtype, card
        self._block_size, self._most_rows = block_size, most_rows
        self._proven_positions = proven_positions
        self._kv_dtype = kv_dtype
        self.kv_dtypes = () if kv_dtype is None else (str(kv_dtype).removeprefix("torch."),)
        self._products = GpuProducts(
            dtype, device, multiprocessors=card.multiprocessors, proof=proof, tuning=tuning
        )
        self._attentions: dict[HeadShape, Attention] = {}
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._workspaces: dict[tuple[HeadShape, int, int], Workspace] = {}
        self._of_step: dict[HeadShape, Workspace] = {}  # none: the step goes through the kernels of prompts
        self._digests: list[str] = []
        self._is_one_class = True
        self.row_plan = dataclasses.replace(self._products.row_plan, generated_tile=most_rows)

    @property
    def numerics_class(self) -> str:
        card = self._card
        parts = [
            "cuda",
            card.name,
            f"sm_{card.capability}",
            str(self.dtype).removeprefix("torch."),
            f"torch-{torch.__version__}",
            f"triton-{triton.__version__}",
            "-".join(self._digests),
        ]
        if self._is_one_class:
            parts.append(ONE_CLASS)
        return "/".join(parts)

    def check(self, shape: HeadShape) -> None:
        check_heads(shape)
        if shape not in self._attentions:
            self._attentions[shape] = Attention(
                shape,
                self.dtype,
                self._block_size,
                capability=self._card.capability,
                multiprocessors=self._card.multiprocessors,
                kv_dtype=self._kv_dtype,
            )

    def enter_thread(self) -> None:
        """What is launched without a device goes to this one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def memory(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._products.linear(weight, bias)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._products.gated_linear(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Linear:
        return self._products.tied_linear(embedding)

    def prepare(self, rows: Rows) -> Rows:
        """Rows may be on the device already, of a step that is recorded: then nothing of them is read."""
        rows = dataclasses.replace(rows.to(self.device), tiles=rows.tiles.to(self.device))
        self._of_step, count = {}, rows.num_generated_tiles
        if count and (rows.num_rows == rows.padded_generated or not self._is_one_class):
            for shape, attention in self._attentions.items():
                workspace = self._workspace(shape, rows.padded_generated, count)
                attention.list_work(rows.tiles[:count], workspace)
                self._of_step[shape] = workspace
        return rows

    def _workspace(self, shape: HeadShape, rows: int, tiles: int) -> Workspace:
        """All of them share their partial results, since no two are in use at a time."""
        found = self._workspaces.get((shape, rows, tiles))
        if found is None:
            attention = self._attentions[shape]
            places = 2 * tiles + _PLACES_EACH * self._card.multiprocessors
            needed = attention.partial_elements(self._most_rows, places)
            if needed > len(self._partials):
                self._partials = torch.empty(needed, dtype=torch.float32, device=self.device)
            found = attention.workspace(
                rows, tiles, self._most_rows, places, self.device, partials=self._partials
            )
            if rows == tiles:  # as in every bucket; steps with drafts that fit into none differ without end
                self._workspaces[shape, rows, tiles] = found
        return found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        if x.shape[0]:
            norms.rms_norm(x, weight, out, eps)
        return out

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(delta)
        if delta.shape[0]:
            norms.add_rms_norm(delta, residual, weight, out, eps)
        return out

    def gated_mlp(self, x: Tensor, gate_up: Linear, down: Linear, padded_generated: int) -> Tensor:
        return down(gate_up(x, padded_generated), padded_generated)

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
        attention, segment = self._attentions[shape], Segment.of(cache, layer)
        attention.store(qkv, rows.positions, rows.slots, segment, rope, norms, eps)
        size = (rows.num_rows, shape.num_heads * shape.head_dim)
        workspace, tiles = self._of_step.get(shape), rows.tiles
        is_filled = workspace is not None and workspace.rows == rows.num_rows
        make = torch.empty if is_filled or self.row_plan.takes_any else torch.zeros  # there may be padding
        out = make(size, dtype=self.dtype, device=self.device)
        if workspace is not None:
            attention.generated(qkv, rows.tables, segment, workspace, out)
            tiles = tiles[rows.num_generated_tiles :]
        if not is_filled:
            attention.prompt(qkv, tiles, rows.tables, segment, out, self._largest_tile)
        return out

    @property
    def _largest_tile(self) -> int:
        return max(self.row_plan.query_tile, self._most_rows)

    def settle(self) -> None:
        products = self._products.settle()
        tile = min(attention.query_rows for attention in self._attentions.values())
        plan = self._products.row_plan
        self.row_plan = dataclasses.replace(plan, query_tile=tile, generated_tile=self._most_rows)
        proofs = [
            prove(attention, self._most_rows, tile, self.device, self._proven_positions)
            for attention in self._attentions.values()
        ]
        self._is_one_class = plan.takes_any and all(proof.is_one_class for proof in proofs)
        self._digests = [products, *(proof.digest for proof in proofs)]
        log.info("attention.proof", one_class=self._is_one_class, digests=self._digests)
