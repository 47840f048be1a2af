"""Compile every GPU kernel ahead of time, without a GPU: what machine code takes, what it should cost.

    python -m bench.gpu_kernels                            a table for the shapes of Qwen3-8B
    python -m bench.gpu_kernels --targets 80 90 --json     as the tests read it
    python -m bench.gpu_kernels --every --only product     every product in every bucket of rows

Registers, spills and shared memory are what ptxas and cuobjdump say of the machine code; the time is computed
from bytes and operations, at the rates of the card named, and is no measurement.

Fused multiply-adds count in float32 and float64 only: a card without sums of bfloat16 computes them as
`fma(a, 1, b)`, which rounds as a sum does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.engine.devices.cuda import attention_works, norms, product_plans, sampler_state, sampling_launches
from common.engine.devices.cuda.launch import OPTIONS, Work
from common.engine.devices.cuda.product_plans import Shape
from common.engine.devices.device import HeadShape

TARGETS = (80, 89, 90, 100, 120)  # compute capabilities, times ten
KINDS = {"bf16": 2, "fp16": 2, "fp32": 4}  # triton's words, and bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# bytes a second that a copy reaches, and products of bfloat16 a second (gpu-engine.md, section 5)
CARDS = {"H100": (3.0e12, 790e12), "H200": (4.3e12, 790e12)}

MULTIPROCESSORS = 132  # of both

# the most shared memory of one program, in bytes (CUDA C Programming Guide, table of compute capabilities)
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_PRODUCTS = re.compile(r"(?:wgmma\.mma_async|mma)\.[\w.:]*?m\d+n\d+k\d+|tcgen05\.mma")
_FUSED = re.compile(r"\bfma\.\w+(?:\.ftz)?\.f(?:32|64)\b")
_COPIES = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """What the launches of a model depend on. Default: Qwen3-8B."""

    hidden: int = 4096
    intermediate: int = 12288
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936
    num_layers: int = 36
    block_size: int = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """The machine code of one `Work` for one target."""

    name: str
    target: int
    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a program
    products: tuple[str, ...]  # the tensor cores' instructions, without their types
    copies: tuple[int, ...]  # bytes that a thread asks for at once of what it copies to shared memory
    fused: int  # fused multiply-adds in PTX
    may_fuse: bool


def works(shape: ModelShape, kind: str, target: int, *, every: bool = False) -> Iterator[Work]:
    """Every launch of a step on a card of this target: as many rows as a bucket of generated ones has, and a
    prompt's. Of products and attention only those that have little in common, unless `every`."""
    size = KINDS[kind]
    for rows in (1, 64, 2048):
        yield from norms.works(rows, shape.hidden, kind, size)
    yield from _products(shape, kind, every)
    yield from sampling_launches.works(64, shape.vocab, kind, size, MULTIPROCESSORS, every=every)
    if every:
        yield from sampler_state.works(shape.vocab)
    heads = HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim, 0)
    yield from attention_works.works(heads, shape.block_size, DTYPES[kind], target, every=every)


def _products(shape: ModelShape, kind: str, every: bool) -> Iterator[Work]:
    heads = shape.num_heads + 2 * shape.num_kv_heads
    shapes = {
        "qkv": Shape(heads * shape.head_dim, shape.hidden, gated=False, biased=False),
        "o": Shape(shape.hidden, shape.num_heads * shape.head_dim, gated=False, biased=False),
        "gate_up": Shape(shape.intermediate, shape.hidden, gated=True, biased=False),
        "down": Shape(shape.hidden, shape.intermediate, gated=False, biased=False),
        "head": Shape(shape.vocab, shape.hidden, gated=False, biased=False),
    }
    rows: dict[str, tuple[int, ...]] = {
        "bf16": {"qkv": (1, 64, 2048), "gate_up": (1, 256, 2048), "down": (1,)},
        "fp16": {"gate_up": (1,)},
        "fp32": {"qkv": (64,)},
    }[kind]
    for name in shapes if every else rows:
        for count in (1, 16, 32, 64, 128, 256, 2048) if every else rows[name]:
            yield product_plans.work(name, shapes[name], count, kind, KINDS[kind], MULTIPROCESSORS)


def compiled(work: Work, target: int) -> Compiled:
    """Raises what triton or ptxas raises where a kernel does not compile."""
    kernel, names = work.launch.kernel, work.parameters()
    signature = dict(zip(names, work.types, strict=True)) | dict.fromkeys(work.launch.constants, "constexpr")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    parameters = {parameter.name: parameter for parameter in kernel.params}
    aligned = [
        name
        for name, kind in zip(names, work.types, strict=True)
        if (kind[0] == "*" and not parameters[name].do_not_specialize_on_alignment)
        or (name in work.multiples and not parameters[name].do_not_specialize)
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={places[name]: value for name, value in work.launch.constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": work.launch.num_warps, "num_stages": work.launch.num_stages, **OPTIONS}
    code = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx: str = code.asm["ptx"]
    registers, stack, _, local = _resources(code.asm["cubin"])
    return Compiled(
        name=work.name,
        target=target,
        registers=registers,
        spilled=stack + local,
        shared=code.metadata.shared,
        products=tuple(sorted(set(_PRODUCTS.findall(ptx)))),
        copies=tuple(sorted({int(size, 0) for size in _COPIES.findall(ptx)})),
        fused=len(_FUSED.findall(ptx)),
        may_fuse=work.may_fuse,
    )


def _resources(cubin: bytes) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = _USAGE.search(said)
    assert found is not None, said
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack, shared, local


@functools.cache
def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def seconds(work: Work, card: str) -> float:
    """The least time of a launch: its bytes or its operations, whichever takes longer."""
    bytes_a_second, flops_a_second = CARDS[card]
    return max(work.num_bytes / bytes_a_second, work.flops / flops_a_second)


def table(rows: Mapping[str, Mapping[int, Work]], targets: Iterable[int]) -> Iterator[str]:
    """A line for each name; programs, which some cards have more of, as on the first target."""
    numbers = ("programs", "MB", "GFLOP", *(f"{card} us" for card in CARDS))
    columns = [f"{number:>9}" for number in numbers] + [f"  sm_{target:<3} regs shared" for target in targets]
    yield f"{'':44}" + "".join(columns)
    for name, by_target in rows.items():
        work = next(iter(by_target.values()))
        cells = [f"{work.num_programs:>9}", f"{work.num_bytes / 1e6:9.2f}", f"{work.flops / 1e9:9.2f}"]
        cells += [f"{seconds(work, card) * 1e6:9.2f}" for card in CARDS]
        for code in (compiled(of_target, target) for target, of_target in by_target.items()):
            cells.append(f"{code.registers:>13} {code.shared:>6}{'!' if code.spilled else ' '}")
        yield f"{name:44}" + "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--kind", default="bf16", choices=KINDS)
    parser.add_argument("--only", default="", help="works whose name has this in it")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each work and target")
    parser.add_argument("--every", action="store_true", help="every product in every bucket of rows")
    arguments = parser.parse_args()
    rows: dict[str, dict[int, Work]] = {}
    for target in arguments.targets:
        for work in works(ModelShape(), arguments.kind, target, every=arguments.every):
            if arguments.only in work.name:
                rows.setdefault(work.name, {})[target] = work
    if arguments.json:
        for by_target in rows.values():
            for target, work in by_target.items():
                print(json.dumps(dataclasses.asdict(compiled(work, target))), flush=True)
    else:
        for line in table(rows, arguments.targets):
            print(line, flush=True)


if __name__ == "__main__":
    main()
