"""What a device must do, once: protocols, of which everything that runs on it is made.

    Device      a place to compute: its memory and its errors; the only thing that is chosen (choice.py)
    Backend     the operations of one model in one type, by this device's kernels
    Sampling    the arithmetic that chooses tokens, and the counts behind it (sampling.py)
    DeviceQueue     for a device that computes later: what a host may ask of it then (queue.py)

The decoder (model/) is written against `Backend` alone, the sampler (runner/) against `Sampling`;
neither asks what device it is. A backend owns its kernels, how weights are laid out for them, and
its numerics class; it knows nothing of layers, sequences or scheduling.

**The numerics rule.** What computes a position depends on whether the position is prompt or
generated, never on how the step was batched. A backend that promises it says so in
`numerics_class`; results are reproducible bit by bit between nodes whose classes are equal.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from common.engine.devices.filling import Filler
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.queue import DeviceQueue
from common.engine.devices.rows import RowPlan, Rows
from common.engine.devices.sampling import Sampling, StepSampling
from common.settings.config import EngineSettings


@dataclasses.dataclass(frozen=True, slots=True)
class StepLimits:
    """How much one step takes at most."""

    max_num_seqs: int
    max_num_batched_tokens: int


class Device(Protocol):
    """Cheap to make: nothing is computed, compiled or allocated before it is asked for."""

    torch_device: torch.device  # of every tensor of the model, and of the pool

    def __init__(self, settings: EngineSettings) -> None: ...

    @staticmethod
    def is_present() -> bool:
        """Whether this machine has one."""
        ...

    def default_limits(self) -> StepLimits:
        """Of steps, where the settings leave them open."""
        ...

    def preferred_dtype(self, stored: str) -> torch.dtype:
        """The type to compute in, where the settings leave it open, for weights of this type."""
        ...

    def backend(self, dtype: torch.dtype) -> Backend:
        """The operations for one model, by the thread that will compute. `ConfigError` for a type in
        which it does not compute."""
        ...

    def sampling(self, vocab_size: int) -> Sampling:
        """By the thread that will compute, after its backend."""
        ...

    def filler(self) -> Filler:
        """What brings stored tensors into the memory that its backends give."""
        ...

    def queue(self) -> DeviceQueue | None:
        """Where steps are given to it; None where everything has been computed when a call returns."""
        ...

    def step_sampling(self, vocab_size: int) -> StepSampling:
        """In place of `sampling`, for steps that go into a queue."""
        ...

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        """Zeroed memory for a KV pool of this process alone, uint8 `[num_blocks, slab_bytes]`."""
        ...

    def free_memory(self) -> int:
        """Bytes that this process may allocate now: what is free, within its share of the memory where
        it has one. `InsufficientMemory` if it cannot have that share."""
        ...

    def default_pool_bytes(self, free: int) -> int:
        """How much of `free` bytes a KV pool takes at most where no setting says so."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether this error of a step says that the device computes nothing any more in this
        process, whatever it is asked for."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of one attention layer; `window` in tokens, 0 for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    window: int


class Linear(Protocol):
    """A weight, prepared for a device once."""

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        """x `[rows, in]` → `[rows, out]`; the first `padded_generated` rows are generated ones."""
        ...


class Backend(Protocol):
    """Inputs are contiguous, in the backend's dtype, rows as in `Rows`."""

    device: torch.device
    dtype: torch.dtype
    kv_dtypes: tuple[str, ...]  # of `SCALED_DTYPES` in which it keeps KV (scaled_rows.py), beside its own
    row_plan: RowPlan

    @property
    def numerics_class(self) -> str:
        """What the bits depend on besides model, request and the KV's dtype, which the engine adds; equal
        classes give equal bits."""
        ...

    def check(self, shape: HeadShape) -> None:
        """Called at load for each layer; raises `UnsupportedModel` for heads it cannot compute."""
        ...

    def memory(self, *shape: int) -> Tensor:
        """Memory for a weight or another parameter, in the backend's dtype and place, not yet filled."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare weight `[out, in]`, out of `memory`; the caller drops its own reference, no second copy
        stays. On a device with a queue it may not be filled yet, but will be when its turn comes."""
        ...

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare weight `[2 * inner, in]`, gate rows over up rows, for `gated_mlp` and nothing else."""
        ...

    def tied_linear(self, embedding: Tensor) -> Linear:
        """A head on the embedding `[vocab, hidden]` that stays in use as such: no copy."""
        ...

    def prepare(self, rows: Rows) -> Rows:
        """Called once a step, before its operations, with rows on the host, or in a queue on the device: the
        same rows where the operations want them, and whatever else all layers need of them."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += delta in place; returns the norm of residual."""
        ...

    def gated_mlp(self, x: Tensor, gate_up: Linear, down: Linear, padded_generated: int) -> Tensor:
        """down(silu(gate) * up) of x `[rows, hidden]`; gate_up is a `gated_linear`."""
        ...

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
        """Norm and rotate queries and keys, store keys and values, attend to what is stored.

        qkv `[rows, (heads + 2 * kv_heads) * head_dim]`, may be overwritten; rope float32
        `[positions, rotary_dim / 2]` twice; norms are q's and k's `[head_dim]`. Returns
        `[rows, heads * head_dim]`; padding rows hold anything finite.
        """
        ...

    def settle(self) -> None:
        """Called once, when all weights are prepared; may change `row_plan` and the class."""
        ...

    def enter_thread(self) -> None:
        """Called before each step, by the thread that computes it: thread counts are kept per
        thread, and another engine in this one may have changed them. Must cost next to nothing."""
        ...
