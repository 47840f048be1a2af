"""Products on a GPU: bits that do not depend on the rows beside, and what they take beside the library's.

Shapes are those of Qwen3-8B, so that what is proven and timed is what is served.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from common.engine.devices.cuda.card import Card
from common.engine.devices.cuda.product_plans import BUCKETS
from common.engine.devices.cuda.products import GpuProducts, Linear
from common.engine.devices.cuda.timing import EventTimer
from common.engine.devices.cuda.tuning import Tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda", 0)
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
HEAD = (151_936, 4096)


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(shape[0])
    return (torch.randn(shape, generator=generator, device=DEVICE) / shape[1] ** 0.5).to(dtype)


def settled(
    shape: tuple[int, int], dtype: torch.dtype, *, gated: bool = False, tuning: Tuning | None = None
) -> tuple[Linear, torch.Tensor, str]:
    multiprocessors = Card.of(DEVICE).multiprocessors
    products = GpuProducts(dtype, DEVICE, multiprocessors=multiprocessors, tuning=tuning)
    weight = weight_of(shape, dtype)
    linear = products.gated_linear(weight, None) if gated else products.linear(weight, None)
    digest = products.settle()
    assert products.row_plan.takes_any
    return linear, weight, digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_one_result_in_prompts_and_steps_of_any_size(name: str, dtype: torch.dtype) -> None:
    linear, weight, _ = settled(SHAPES[name], dtype, gated=name == "gate_up")
    x = torch.randn(3000, weight.shape[1], device=DEVICE).to(dtype)
    whole = linear(x, 0)
    for first, rows in ((0, 1), (2999, 1), (17, 16), (5, 33), (100, 70), (1000, 200), (2, 300), (900, 2100)):
        assert torch.equal(linear(x[first : first + rows], rows), whole[first : first + rows])


def test_the_order_does_not_depend_on_what_was_measured() -> None:
    _, _, plain = settled(SHAPES["o"], torch.bfloat16)
    _, _, tuned = settled(SHAPES["o"], torch.bfloat16, tuning=Tuning(EventTimer(DEVICE), None))
    assert tuned == plain


def test_a_graph_that_is_replayed_gives_the_same_bits_each_time() -> None:
    """The counters of tiles are back at zero after each launch."""
    linear, weight, _ = settled(SHAPES["down"], torch.bfloat16)
    x = torch.randn(16, weight.shape[1], device=DEVICE).bfloat16()
    wanted = linear(x, 16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, 16)
    for _ in range(100):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", [*SHAPES, "head"])
def test_what_products_take_beside_the_librarys(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """Figures only; how fast is fast enough is for whoever reads them."""
    timer = EventTimer(DEVICE)
    shape = HEAD if name == "head" else SHAPES[name]
    linear, weight, _ = settled(shape, torch.bfloat16, gated=name == "gate_up", tuning=Tuning(timer, None))
    record_property("ways", [way.name for way in linear._plan.ways])
    for rows in (1, *BUCKETS, *(() if name == "head" else (2048,))):
        x = torch.randn(rows, shape[1], device=DEVICE).bfloat16()
        seconds = timer(lambda x=x, rows=rows: linear(x, rows))  # type: ignore[misc]
        library = timer(lambda x=x: F.linear(x, weight))  # type: ignore[misc]
        gigabytes = 2 * (weight.numel() + x.numel() + rows * shape[0]) / 1e9
        figures = {"us": seconds * 1e6, "library_us": library * 1e6, "tb_s": gigabytes / seconds / 1e3}
        figures["tflop_s"] = 2 * rows * weight.numel() / seconds / 1e12
        record_property(f"{rows} rows", {key: round(value, 2) for key, value in figures.items()})
