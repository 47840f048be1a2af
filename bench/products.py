"""Products of our own beside oneDNN's, in turns, by shape and number of rows: `python -m bench.products`.

Each product of a model's layer, and its head on the embedding (`tied`), takes turns with oneDNN's on the same
weight; weights of some 200 MB are gone through, so that none comes from the cache. `limit` is what the
machine allows, measured before: the bytes of the weight at the rate of reading, or the operations at that of
a large product, whichever takes longer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.limits import measure_limits
from common.engine.devices.cpu.numba_runtime import set_num_threads
from common.engine.devices.cpu.products import OneDnnProducts, OwnProducts, Product

SHAPES = {  # in, out: of the 0.5B body of bench/models, and of SmolLM2-135M
    "gate_up": (1024, 9728, False),
    "down": (4864, 1024, False),
    "qkv": (1024, 1536, False),
    "output": (1024, 1024, False),
    "tied head": (1024, 32000, True),
    "gate_up of 135M": (576, 3072, False),
    "output of 135M": (576, 576, False),
}
ALL_BYTES = 200e6


def made(width: int, columns: int, tied: bool, dtype: torch.dtype) -> dict[str, list[Product]]:
    """As many equal weights as fill the caches several times, for both."""
    weight = (torch.randn(columns, width) * 0.05).to(dtype)
    count = max(2, round(ALL_BYTES / weight.nbytes))
    found: dict[str, list[Product]] = {}
    for name, products in (("own", OwnProducts(dtype)), ("oneDNN", OneDnnProducts(dtype))):
        if tied:
            found[name] = [products.tied_linear(weight.clone()) for _ in range(count)]
        else:
            found[name] = [products.linear(weight.clone(), None) for _ in range(count)]
    return found


def seconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3, help="through all weights of a shape")
    arguments = parser.parse_args()
    set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    limits = measure_limits(dtype)
    print(
        f"{arguments.dtype}, {arguments.threads} threads; matmul {limits.matmul_flops / 1e9:.0f} GFLOP/s, "
        f"read {limits.read_bytes / 1e9:.1f} GB/s"
    )
    print(f"{'':18}{'rows':>5}{'own ms':>10}{'oneDNN ms':>11}{'oneDNN/own':>12}{'own of limit':>14}")
    for shape, (width, columns, tied) in SHAPES.items():
        both = made(width, columns, tied, dtype)
        for rows in arguments.rows:
            x = torch.randn(rows, width).to(dtype)
            best = dict.fromkeys(both, float("inf"))
            for turn in range(arguments.turns + 1):  # the first one warms up
                for own, theirs in zip(both["own"], both["oneDNN"], strict=True):
                    for name, product in (("own", own), ("oneDNN", theirs)):
                        took = seconds(product.product, x)
                        if turn:
                            best[name] = min(best[name], took)
            bytes_s = width * columns * dtype.itemsize / limits.read_bytes
            limit = max(bytes_s, 2.0 * rows * width * columns / limits.matmul_flops)
            print(
                f"{shape:18}{rows:5}{best['own'] * 1e3:10.3f}{best['oneDNN'] * 1e3:11.3f}"
                f"{best['oneDNN'] / best['own']:12.2f}{limit / best['own']:14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
