"""A device for an engine on a pretended accelerator: the reference's operations, as kernels of its own.

Products are summed in float64, so that a row's tokens do not depend on how many rows there are; whoever
compares takes `alone`, the same operations without a queue.
"""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.device import Backend, HeadShape, StepLimits
from common.engine.devices.filling import Filler, HostFiller
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.queue import DeviceQueue
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.reference.sampling import TorchSampling
from common.engine.devices.rows import RowPlan, Rows
from common.engine.devices.sampling import RowBuffers, Sampled, Sampling, StepSampling
from common.engine.runner.sampler import accepted
from common.engine.sampling.records import Logprobs, SampleOutput, SampleRows
from common.engine.sampling.slots import SlotTable
from common.settings.config import EngineSettings
from tests.support.fake_accelerator import LOST, FakeAccelerator, FakeQueue
from tests.support.recorded_calls import kernel

CPU = torch.device("cpu")


class _WideLinear:
    """Its weight is filled after it was made."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._wide: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor, padded_generated: int) -> Tensor:
        if self._wide is None:
            bias = self._bias
            self._wide = self._weight.double(), None if bias is None else bias.double()
        return F.linear(x.double(), *self._wide).to(x.dtype)


class FakeBackend(ReferenceBackend):
    """Attention is a kernel: it looks at tiles and tables when it is computed, row by row."""

    row_plan = RowPlan(prompt_rows=1, generated_rows=1, generated_multiple=1, query_tile=1)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Any:
        return _WideLinear(weight, bias)

    def tied_linear(self, embedding: Tensor) -> Any:
        return _WideLinear(embedding, None)

    def attention(
        self, qkv: Tensor, rows: Rows, cache: KVCache, layer: int, shape: HeadShape, *further: Any
    ) -> Tensor:
        out = torch.zeros(rows.num_rows, shape.num_heads * shape.head_dim, dtype=qkv.dtype)

        def attend() -> None:
            out.copy_(ReferenceBackend.attention(self, qkv, rows, cache, layer, shape, *further))

        kernel(attend)
        return out


@dataclasses.dataclass(frozen=True)
class _Changes:
    words: NDArray[np.int64]


class FakeStepSampling:
    """`TorchSampling`, with what the host changes on its way to the device as bytes."""

    most_rows = 16

    def __init__(self, vocab_size: int) -> None:
        self._inner = TorchSampling(vocab_size, CPU)
        self._free: list[int] = []
        self._rows = 0
        self._pending: list[tuple[str, int, Any]] = []
        self._sent = b""
        self._table: SlotTable | None = None  # the device's copy

    def bind(self, num_slots: int) -> None: ...

    # The host's side.

    def open_counts(self, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
        if not self._free:
            self._free, self._rows = [self._rows], self._rows + 1
        row = self._free.pop()
        self._pending.append(("open", row, (prompt, generated)))
        return row

    def close_counts(self, row: int) -> None:
        self._free.append(row)
        self._pending.append(("close", row, ()))

    def append_counts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        raise AssertionError("the device counts")

    def changes(self, table: SlotTable) -> _Changes:
        state = pickle.dumps(table)
        if not self._pending and state == self._sent:
            return _Changes(np.empty(0, np.int64))
        self._sent = state
        sent = pickle.dumps((self._pending, state))
        self._pending = []
        words = np.zeros(1 + -(-len(sent) // 8), np.int64)
        words[0] = len(sent)
        words[1:].view(np.uint8)[: len(sent)] = np.frombuffer(sent, np.uint8)
        return _Changes(words)

    def resend(self) -> None:
        self._sent = b""

    # The device's.

    def apply(self, words: Tensor, changes: _Changes) -> None:
        sent = words[1:].numpy().view(np.uint8)[: int(words[0])].tobytes()
        pending, state = pickle.loads(sent)
        self._table = pickle.loads(state)
        self._count(pending)

    def _count(self, pending: list[tuple[str, int, Any]]) -> None:
        inner = self._inner
        for what, row, tokens in pending:
            while row >= len(inner._counts):
                more = max(8, len(inner._counts))
                inner._counts = torch.cat([inner._counts, inner._counts.new_zeros(more, inner._vocab_size)])
            inner._counts[row].zero_()
            if what == "open":
                inner._free = [row]
                inner.open_counts(*tokens)

    def choose_into(self, logits: Tensor, rows: RowBuffers, out: Sampled, *, greedy: bool) -> None:
        kernel(lambda: self._sample(logits, rows, out, greedy))

    def _sample(self, logits: Tensor, rows: RowBuffers, out: Sampled, greedy: bool) -> None:
        fields = {name: getattr(rows, name).numpy().copy() for name in RowBuffers.__dataclass_fields__}
        (known,) = np.nonzero(fields["slots"] >= 0)
        of_rows = {name: values[known] for name, values in fields.items() if name != "drafted"}
        asked = SampleRows(drafted=fields["drafted"], **of_rows)
        out.tokens.fill_(-1)
        out.faults.zero_()
        if not len(known):
            return
        assert len(out.tokens) <= self.most_rows
        assert self._table is not None
        records = self._table.records[asked.slots]
        assert records["live"].all(), "a row names a free slot"
        if greedy:
            assert not records["temperature"].any()
            assert not records["edited"].any()
            assert (records["logprobs"] < 0).all()
        found = self._inner.sample(logits, asked, self._table)
        at = torch.from_numpy(known)
        out.tokens[at] = torch.from_numpy(found.token_ids)
        out.faults[at] = torch.from_numpy(found.faults)
        if (scores := found.logprobs) is not None:
            out.chosen[at] = torch.from_numpy(scores.chosen)
            out.ranks[at] = torch.from_numpy(scores.ranks)
            out.top_ids.fill_(-1)
            out.top_ids[at, : scores.top.shape[1]] = torch.from_numpy(scores.top_ids)
            out.top[at, : scores.top.shape[1]] = torch.from_numpy(scores.top)
        _, taken = accepted(asked, found)
        counts = records["counts"][taken]
        tracked = counts >= 0
        self._inner.append_counts(counts[tracked], found.token_ids[taken][tracked])

    # Without a queue.

    def sample(self, logits: Tensor, rows: SampleRows, table: SlotTable) -> SampleOutput:
        pending, self._pending = self._pending, []
        self._count(pending)
        return self._inner.sample(logits, rows, table)

    def logprobs(
        self, logits: Tensor, targets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Logprobs, NDArray[np.uint8]]:
        return self._inner.logprobs(logits, targets, counts)


class FakeDevice:
    """Without an accelerator, for `alone`, it has no queue."""

    torch_device = CPU
    free_bytes = 1 << 30

    def __init__(self, settings: EngineSettings, accelerator: FakeAccelerator | None = None) -> None:
        self.accelerator = accelerator
        self._queue: FakeQueue | None = None

    @staticmethod
    def is_present() -> bool:
        return True

    def default_limits(self) -> StepLimits:
        return StepLimits(8, 64)

    def preferred_dtype(self, stored: str) -> torch.dtype:
        return torch.float32

    def backend(self, dtype: torch.dtype) -> Backend:
        return FakeBackend(CPU, dtype, "fake")

    def filler(self) -> Filler:
        return HostFiller(1)

    def sampling(self, vocab_size: int) -> Sampling:
        return TorchSampling(vocab_size, CPU)

    def queue(self) -> DeviceQueue | None:
        if self.accelerator is not None and self._queue is None:
            self._queue = self.accelerator.queue()
        return self._queue

    def step_sampling(self, vocab_size: int) -> StepSampling:
        return FakeStepSampling(vocab_size)

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        memory = torch.zeros((num_blocks, slab_bytes), dtype=torch.uint8)
        if self._queue is not None:
            self._queue.own(memory)
        return memory

    def free_memory(self) -> int:
        return self.free_bytes

    def default_pool_bytes(self, free: int) -> int:
        return free

    def synchronize(self) -> None: ...

    def is_lost(self, error: BaseException) -> bool:
        return str(error) == LOST
