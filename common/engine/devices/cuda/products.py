"""Products on a GPU: weights as they lie in the checkpoint, and one launch for any rows.

Owns the weights' plans and the memory that their launches share. All rows, prompt or generated, are in one
numerics class: a row of a product depends on that row and the weight alone (kernels/products.py), as `settle`
proves. Where nothing that takes any rows passes, calls have exact numbers of rows, as `row_plan` then says.

One `GpuProducts` belongs to one stream: two launches at a time would mix up their sums. A launch allocates
its output only and waits for nothing, so that graphs may capture it once `settle` has been called.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.devices.cuda import product_plans
from common.engine.devices.cuda.product_plans import BUCKETS, Order, Shape, bucket_of
from common.engine.devices.cuda.product_ways import InExactCalls, LibraryWay, TiledWay, Workspace
from common.engine.devices.cuda.settling import (
    FULL,
    Operands,
    Proof,
    Ranking,
    Way,
    Weight,
    among_strangers,
    as_given,
    digest_of,
    is_near,
    same_bits,
    settle,
)
from common.engine.devices.cuda.tuning import Tuning
from common.engine.devices.rows import RowPlan
from common.errors import ConfigError
from common.logs import get_logger

log = get_logger("products")

QUERY_TILE = 64
LIBRARY_ROWS = (2048, 1024, 512)  # of a call, in which the vendor's library may serve prompts
_TIMED_ROWS = 2048  # of a prompt
ANY_ROWS = RowPlan(1, 1, 1, query_tile=QUERY_TILE)
EXACT_ROWS = RowPlan(prompt_rows=256, generated_rows=32, generated_multiple=32, query_tile=QUERY_TILE)


@dataclasses.dataclass(slots=True)
class Plan:
    """How products with weights of one shape are computed: for each bucket, and for more rows."""

    shape: Shape
    order: Order
    ways: tuple[Way, ...] = ()  # none before `settle`
    is_exact: bool = False  # in calls of `EXACT_ROWS`, all of them by `ways[0]`
    digest: str = ""


class Linear:
    """A weight and its plan. Implements `Linear` of device.py."""

    def __init__(self, weight: Weight, plan: Plan) -> None:
        self.in_features, self.out_features = weight.shape.in_features, weight.shape.out_features
        self._weight, self._plan = weight, plan

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        """x `[rows, in]` → `[rows, out]`; of a gated weight silu(gate) * up."""
        rows, plan = x.shape[0], self._plan
        out = torch.empty(rows, self.out_features, dtype=x.dtype, device=x.device)
        if plan.is_exact:
            for part in EXACT_ROWS.slices(rows, padded_generated):
                plan.ways[0](self._weight, x[part], out[part])
        elif rows:
            plan.ways[bucket_of(rows)](self._weight, x, out)
        return out


class GpuProducts:
    """See the module. `row_plan` is final after `settle`."""

    row_plan = ANY_ROWS

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        multiprocessors: int,
        proof: Proof = FULL,
        tuning: Tuning | None = None,
    ) -> None:
        """`tuning` says which of the launches that pass the proof is the fastest; without it the likely best
        is taken."""
        self._dtype, self._device = dtype, device
        self._multiprocessors, self._proof, self._tuning = multiprocessors, proof, tuning
        self._workspace = Workspace(device)
        self._plans: dict[Shape, Plan] = {}

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight `[out, in]`, bias `[out]`, on the device, of the products' type: kept as they are."""
        return self._prepared(weight, bias, gated=False)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight `[2 * out, in]`: gate rows over up rows. The product is silu(gate) * up."""
        return self._prepared(weight, bias, gated=True)

    def tied_linear(self, embedding: Tensor) -> Linear:
        """All weights stay as they lie, and so this one does."""
        return self._prepared(embedding, None, gated=False)

    def _prepared(self, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Linear:
        assert weight.dtype == self._dtype
        assert weight.stride(1) == 1
        assert bias is None or (bias.dtype == self._dtype and bias.is_contiguous())
        shape = Shape(weight.shape[0] // (2 if gated else 1), weight.shape[1], gated, bias is not None)
        if shape not in self._plans:
            order = product_plans.order_of(shape, self._multiprocessors, self._dtype.itemsize)
            self._plans[shape] = Plan(shape, order)
        return Linear(Weight(shape, weight, bias), self._plans[shape])

    def settle(self) -> str:
        """Choose how each product is computed, and prove it (settling.py); returns a digest of the orders and
        of what they give. `ConfigError` where not even calls of an exact number of rows repeat themselves."""
        digest = hashlib.blake2b(digest_size=6)
        for shape in sorted(self._plans):
            plan = self._plans[shape]
            self._settle(plan)
            digest.update(f"{shape} {plan.order} {plan.is_exact} {plan.digest}\n".encode())
            if plan.is_exact:
                self.row_plan = EXACT_ROWS
        if self._tuning is not None:
            self._tuning.save()
            self._tuning = None  # with its memory
        return digest.hexdigest()

    def _settle(self, plan: Plan) -> None:
        rows = self._proof.most_rows(plan.shape)
        operands = Operands(plan.shape, rows, self._dtype, self._device)
        described = str(plan.shape)
        settled = settle(operands, self._ladder(plan), self._proof, described, self._ranking(operands, plan))
        if settled is not None:
            plan.ways, plan.digest = settled.ways, settled.digest
        else:
            plan.ways, plan.is_exact = (LibraryWay(),), True
            operands = Operands(plan.shape, EXACT_ROWS.prompt_rows, self._dtype, self._device)
            plan.digest = _proven_exact(operands, plan.ways[0])
        names = [way.name for way in plan.ways]
        log.info("products.plan", shape=described, order=plan.order, ways=names, digest=plan.digest)

    def _ladder(self, plan: Plan) -> Sequence[Sequence[Way]]:
        ladder: list[Sequence[Way]] = []
        for bucket in range(len(BUCKETS) + 1):
            tiles = product_plans.candidates(plan.order, bucket, self._dtype.itemsize)
            ways = [
                TiledWay(plan.shape, plan.order, tile, self._multiprocessors, self._workspace)
                for tile in tiles
            ]
            for way in ways:
                way.reserve(BUCKETS[min(bucket, len(BUCKETS) - 1)])
            ladder.append(ways)
        if self._device.type == "cuda" and self._dtype.itemsize == 2 and plan.order.splits == 1:
            # with more ranges than one it cannot have their order; in float32 it has another one anyway
            tried = self._proof.sizes(plan.shape, len(BUCKETS))
            sizes = [rows for rows in LIBRARY_ROWS if rows in tried]
            ladder[-1] = [*ladder[-1], InExactCalls(LibraryWay(), sizes, ladder[-1][0])]
        return ladder

    def _ranking(self, operands: Operands, plan: Plan) -> Ranking:
        tuning = self._tuning
        if tuning is None:
            return as_given

        def ranked(bucket: int, ways: Sequence[Way]) -> Sequence[Way]:
            rows = min(operands.x.shape[0], (*BUCKETS, _TIMED_ROWS)[bucket])
            key = f"{self._dtype} {plan.shape} {plan.order} {rows} rows"
            return tuning.ranked(key, ways, lambda way: _call(way, operands, rows))

        return ranked


def _call(way: Way, operands: Operands, rows: int) -> None:
    x = operands.x[:rows]
    way(operands.weight, x, x.new_empty(rows, operands.shape.out_features))


def _proven_exact(operands: Operands, way: Way) -> str:
    """A digest of what the way gives in calls of exact numbers of rows."""
    digests = []
    for rows in (EXACT_ROWS.generated_rows, EXACT_ROWS.prompt_rows):
        x = operands.x[:rows]
        whole = operands.result(way, x)
        is_same = same_bits(operands.result(way, x.roll(1, 0)), whole.roll(1, 0))
        for places, strange in among_strangers(x):
            is_same &= same_bits(operands.result(way, strange)[places], whole[places])
        if not is_same or not is_near(operands, way):
            raise ConfigError(
                f"on this GPU a row of a product of {rows} rows depends on the others, so that no result "
                "could be repeated; use kernels reference",
                param="kernels",
            )
        digests.append(digest_of(whole))
    return " ".join(digests)
