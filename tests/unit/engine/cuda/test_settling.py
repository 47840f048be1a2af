"""The ladder: what is not the weight's own order, for every row in every company, is not used.

Ways are sums in plain torch, one column after the other, so that their order is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from common.engine.devices.cuda import product_plans, products
from common.engine.devices.cuda.product_plans import BUCKETS, Shape
from common.engine.devices.cuda.product_ways import InExactCalls, LibraryWay
from common.engine.devices.cuda.products import GpuProducts
from common.engine.devices.cuda.settling import FULL, QUICK, Operands, Proof, Settled, Way, Weight, settle
from common.errors import ConfigError

CPU = torch.device("cpu")
SHAPE = Shape(19, 40, gated=False, biased=True)
PROOF = Proof(rows=(1, 2, 9, 16, 17, 40, 100, 200, 300), repeats=1)


def in_order(columns: Iterable[int], weight: Weight, x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], weight.shape.weight_rows)
    for column in columns:
        total += x[:, column, None].float() * weight.tensor[:, column].float()
    assert weight.bias is not None
    return total + weight.bias


@dataclasses.dataclass
class Summing:
    """First column to last; `spoil` makes of the right sums what the way gives."""

    name: str
    spoil: Callable[[Weight, Tensor, Tensor], Tensor] = lambda weight, x, right: right

    def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
        right = in_order(range(weight.shape.in_features), weight, x)
        out.copy_(self.spoil(weight, x, right))


def backwards(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    return in_order(reversed(range(weight.shape.in_features)), weight, x)


def backwards_if_many(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    return backwards(weight, x, right) if x.shape[0] > 8 else right


def backwards_in_the_second_row(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    right[1:2] = backwards(weight, x[1:2], right)
    return right


def failing(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


def nan(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    right[-1, -1] = float("nan")
    return right


def touched_by_others(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    return right + 0.0 * x.sum()


def nothing(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
    return torch.zeros_like(right)


RIGHT = Summing("right")
WRONG = [
    (backwards, "other bits"),
    (backwards_if_many, "other bits"),
    (backwards_in_the_second_row, "other bits"),
    (failing, "shared memory"),
    (nan, "other bits"),
    (touched_by_others, "one depends on the others"),
]


def settled(ladder: Sequence[Sequence[Way]], proof: Proof = PROOF) -> Settled | None:
    return settle(Operands(SHAPE, proof.most_rows(SHAPE), torch.float32, CPU), ladder, proof, "a shape")


def with_all_right(bucket: int, *ways: Way) -> list[list[Way]]:
    return [list(ways) if place == bucket else [RIGHT] for place in range(len(BUCKETS) + 1)]


@pytest.mark.parametrize(("spoil", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("bucket", [1, 5])
def test_a_wrong_way_is_not_used_and_the_log_says_why(
    spoil: Callable[[Weight, Tensor, Tensor], Tensor],
    reason: str,
    bucket: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = Summing("wrong", spoil)
    found = settled(with_all_right(bucket, wrong, Summing("second", RIGHT.spoil)))
    assert found is not None
    assert [way.name for way in found.ways] == [
        way[-1].name for way in with_all_right(bucket, Summing("second"))
    ]
    said = [vars(record)["values"] for record in caplog.records if record.message == "products.refused"]
    assert [(line["way"], line["bucket"]) for line in said] == [("wrong", bucket)]
    assert reason in said[0]["reason"]


@pytest.mark.parametrize("spoil", [backwards_if_many, failing, nan, touched_by_others, nothing])
def test_a_first_way_that_contradicts_itself_defines_no_order(
    spoil: Callable[[Weight, Tensor, Tensor], Tensor],
) -> None:
    found = settled(with_all_right(0, Summing("wrong", spoil), RIGHT))
    assert found is not None
    assert {way.name for way in found.ways} == {"right"}
    assert settled(with_all_right(0, Summing("wrong", spoil))) is None


def test_where_no_way_of_a_bucket_is_right_the_one_of_fewer_rows_serves() -> None:
    found = settled([[RIGHT], [Summing("second")], [Summing("third", backwards)], [], [RIGHT], [RIGHT]])
    assert found is not None
    assert [way.name for way in found.ways] == ["right", "second", "second", "second", "right", "right"]


def test_what_is_not_tried_is_not_used() -> None:
    found = settled([[RIGHT], *[[Summing("untried")]] * len(BUCKETS)], Proof(rows=(3,), repeats=1))
    assert found is not None
    assert {way.name for way in found.ways} == {"right"}


def test_speed_does_not_choose_the_order() -> None:
    """The fastest way has an order of its own, in which it agrees with itself; the first one's counts."""
    fast = Summing("fast", backwards)
    operands = Operands(SHAPE, 300, torch.float32, CPU)
    ladder = [[RIGHT, fast]] * (len(BUCKETS) + 1)
    found = settle(operands, ladder, PROOF, "a shape", lambda bucket, ways: list(reversed(ways)))
    alone = settle(operands, [[RIGHT]] * (len(BUCKETS) + 1), PROOF, "a shape")
    assert found is not None
    assert found == alone
    assert settle(operands, [[fast]] * (len(BUCKETS) + 1), PROOF, "a shape") != alone


def test_no_memory_is_not_taken_for_a_wrong_way() -> None:
    def full(weight: Weight, x: Tensor, right: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        settled(with_all_right(1, Summing("large", full)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_gated", [False, True])
def test_operands_show_another_order_in_most_elements(dtype: torch.dtype, is_gated: bool) -> None:
    operands = Operands(Shape(61, 200, gated=is_gated, biased=True), 8, dtype, CPU)
    weight, columns = operands.weight, list(range(200))

    def result(order: list[int]) -> Tensor:
        total = in_order(order, weight, operands.x).to(dtype)
        if is_gated:
            gate, up = total.chunk(2, dim=-1)
            total = torch.nn.functional.silu(gate) * up
        assert total.isfinite().all()
        return total

    another = columns[100:] + columns[:100]
    assert (result(columns) != result(another)).float().mean() > 0.75


def test_the_full_proof_tries_every_bucket_its_ends_and_all_calls_of_the_library() -> None:
    assert {1, *BUCKETS, *(rows + 1 for rows in BUCKETS), *products.LIBRARY_ROWS} <= set(FULL.rows)
    head = Shape(151_936, 4096, gated=False, biased=False)
    assert all(FULL.sizes(head, bucket) for bucket in range(len(BUCKETS) + 1))
    assert FULL.most_rows(head) * head.out_features <= FULL.most_outputs


def test_exact_calls_cover_all_rows_by_few_sizes() -> None:
    seen: list[tuple[str, int]] = []

    class Seen(Summing):
        def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
            seen.append((self.name, x.shape[0]))
            super().__call__(weight, x, out)

    operands = Operands(SHAPE, 21, torch.float32, CPU)
    got = operands.result(InExactCalls(Seen("exact"), (8, 4), Seen("rest")), operands.x)
    assert seen == [("exact", 8), ("exact", 8), ("exact", 4), ("rest", 1)]
    assert torch.equal(got, operands.result(RIGHT, operands.x))


def exact_only(monkeypatch: pytest.MonkeyPatch, library: Way) -> GpuProducts:
    """Products whose own kernel has no tile that would do."""
    monkeypatch.setattr(product_plans, "candidates", lambda *_: ())
    monkeypatch.setattr(products, "LibraryWay", lambda: library)
    return GpuProducts(torch.float32, CPU, multiprocessors=4, proof=QUICK)


def test_without_any_kernel_of_ours_calls_have_exact_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Exact(Summing):
        def __call__(self, weight: Weight, x: Tensor, out: Tensor) -> None:
            calls.append(x.shape[0])
            super().__call__(weight, x, out)

    made = exact_only(monkeypatch, Exact("exact"))
    linear = made.linear(torch.randn(SHAPE.out_features, SHAPE.in_features), torch.randn(SHAPE.out_features))
    made.settle()
    assert made.row_plan == products.EXACT_ROWS
    calls.clear()
    linear(torch.randn(64 + 512, SHAPE.in_features), 64)
    assert calls == [32, 32, 256, 256]


@pytest.mark.parametrize("spoil", [backwards_in_the_second_row, touched_by_others, nothing])
def test_where_nothing_repeats_itself_it_is_an_error_at_load(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Weight, Tensor, Tensor], Tensor]
) -> None:
    made = exact_only(monkeypatch, Summing("wrong", spoil))
    made.linear(torch.randn(SHAPE.out_features, SHAPE.in_features), torch.randn(SHAPE.out_features))
    with pytest.raises(ConfigError, match="kernels reference"):
        made.settle()


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, gated=True, biased=False)], ids=str)
def test_the_librarys_products_are_those_of_float64(shape: Shape) -> None:
    operands = Operands(shape, 5, torch.float32, CPU)
    x = torch.randn(5, shape.in_features)
    weight = Weight(shape, torch.randn(shape.weight_rows, shape.in_features), operands.weight.bias)
    out = torch.empty(5, shape.out_features)
    LibraryWay()(weight, x, out)
    wanted = torch.nn.functional.linear(x.double(), weight.tensor.double())
    if weight.bias is not None:
        wanted += weight.bias
    if shape.gated:
        gate, up = wanted.chunk(2, dim=-1)
        wanted = torch.nn.functional.silu(gate) * up
    assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("exact_products")
def test_the_kernel_settles_for_all_kinds_of_weights() -> None:
    made = GpuProducts(torch.bfloat16, CPU, multiprocessors=4, proof=QUICK)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 48, generator=generator) / 7).bfloat16()
    linears = [made.linear(weight, weight[:, 0].contiguous()), made.gated_linear(weight, None)]
    linears.append(made.tied_linear(weight[:33]))
    digest = made.settle()
    assert made.row_plan.takes_any
    x = torch.randn(20, 48, generator=generator).bfloat16()
    for linear in linears:
        out = linear(x, 5)
        assert out.shape == (20, linear.out_features)
        assert torch.equal(linear(x[7:8], 1), out[7:8])
    assert made.settle() == digest
