"""What KV in 8 bits changes of a model: `python -m bench.kv_quality --text FILE`.

The text is read in pieces of the model's context. Of every token its logprob under what came before, with KV
as the model computes it and in each format, in otherwise equal engines. Two columns are by the reference's
operations: KV as the model computes it, which shows what rounding in another order changes, and scales that
are no powers of two but of the row's largest number, in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import kv_layout
from common.engine import Engine, SamplingParams
from common.engine.devices.reference import backend as reference
from common.engine.text import encode
from common.model_files import resolve_model


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    kv_cache_dtype: str
    kernels: str = "auto"
    any_scale: bool = False


KINDS = {
    "auto": Kind("auto"),
    "fp8": Kind("fp8"),
    "fp8_e5m2": Kind("fp8_e5m2"),
    "auto, reference": Kind("auto", "reference"),
    "fp8, any scale": Kind("fp8", "reference", any_scale=True),
}


def scaled_by_the_largest(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = rows.float()
    scale = (rows.abs().amax(-1) / torch.finfo(dtype).max).clamp(min=2.0**-100)
    return (rows / scale.unsqueeze(-1)).to(dtype), scale


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """Of every token of the text but the first of a piece."""

    logprobs: np.ndarray
    likeliest: np.ndarray
    slab_bytes: int


def read(kind: Kind, pieces: list[list[int]], arguments: argparse.Namespace) -> Read:
    if kind.any_scale:
        kv_layout.SCALE_DTYPE, reference.scaled = "float32", scaled_by_the_largest  # type: ignore[attr-defined]
    engine = Engine.load(
        arguments.model,
        dtype=arguments.dtype,
        device="cpu",
        threads=arguments.threads,
        kernels=kind.kernels,
        kv_cache_dtype=kind.kv_cache_dtype,
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    entries = []
    for piece in pieces:
        (completion,) = engine.generate([piece], params)
        assert completion.prompt_logprobs is not None
        entries += [entry for entry in completion.prompt_logprobs if entry is not None]
    return Read(
        np.array([entry.logprob for entry in entries]),
        np.array([entry.top[0][0] for entry in entries]),
        engine.layout.slab_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--length", type=int, default=2047)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    folder = resolve_model(arguments.model, "", weights=False, overrides={})
    ids = encode(folder, Path(arguments.text).read_text())
    pieces = [ids[start : start + arguments.length] for start in range(0, len(ids), arguments.length)]
    pieces = [piece for piece in pieces[: arguments.pieces] if len(piece) == arguments.length]
    found = {name: read(kind, pieces, arguments) for name, kind in KINDS.items()}
    plain = found["auto"]

    def change(of: Read) -> np.ndarray:
        return np.abs(of.logprobs - plain.logprobs)

    rows: dict[str, Callable[[Read], str]] = {
        "perplexity": lambda of: f"{np.exp(-of.logprobs.mean()):.4f}",
        "change of a logprob, mean": lambda of: f"{change(of).mean():.5f}",
        "median": lambda of: f"{np.median(change(of)):.5f}",
        "99th percentile": lambda of: f"{np.percentile(change(of), 99):.4f}",
        "largest": lambda of: f"{change(of).max():.3f}",
        "another likeliest token": lambda of: f"{(of.likeliest != plain.likeliest).mean():.2%}",
        "bytes of a block": lambda of: str(of.slab_bytes),
    }
    print(f"{sum(map(len, pieces))} tokens in pieces of {arguments.length}, {arguments.dtype}")
    print(f"{'kv_cache_dtype':<28}" + "".join(f"{name:>18}" for name in found))
    for title, of in rows.items():
        print(f"{title:<28}" + "".join(f"{of(one):>18}" for one in found.values()))


if __name__ == "__main__":
    main()
