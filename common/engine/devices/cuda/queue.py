"""A queue on a CUDA stream: see `DeviceQueue`.

Waits for this stream alone, never for the device: another stream may hold a transfer whose peer has stalled.
Graphs are recorded on a stream of their own, since work on the default stream cannot be, and in the mode
"thread_local": what other threads allocate meanwhile does not spoil them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from common.engine.devices.queue import Event, Graph, Work


class CudaEvent:
    """See `Event`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # A thread that waits for it sleeps.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()


class CudaGraph:
    """See `Graph`."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph = graph


class CudaQueue:
    """See `DeviceQueue`."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """On `stream`, else on one of its own."""
        self._device = device
        self._stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._recording = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    @contextmanager
    def here(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return CudaEvent(self._stream)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def capture(self, work: Work) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._recording, capture_error_mode="thread_local"
        ):
            work()
        return CudaGraph(graph)

    def replay(self, graph: Graph) -> None:
        assert isinstance(graph, CudaGraph)
        with torch.cuda.stream(self._stream):
            graph.graph.replay()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def peak_of(self, give: Callable[[], object]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        give()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self._device) - before

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def zeros(self, num_bytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
