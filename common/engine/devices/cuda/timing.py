"""How long a launch takes on a GPU, as it does in a step: with what it reads in memory, not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

_TIMES = 7
_OTHER_BYTES = (
    256 << 20
)  # larger than any L2 cache; written in a time in which the host is done with a launch


class Timer(Protocol):
    def __call__(self, launch: Callable[[], None]) -> float:
        """Seconds of one launch, other than the first."""
        ...


class EventTimer:
    """By events on torch's current stream. Its memory goes with it."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.empty(_OTHER_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, launch: Callable[[], None]) -> float:
        launch()  # compiles
        spans: list[tuple[Any, Any]] = []
        for _ in range(_TIMES):
            begin, end = _event(), _event()
            self._other.zero_()
            begin.record()
            launch()
            end.record()
            spans.append((begin, end))
        spans[-1][1].synchronize()
        milliseconds: float = statistics.median(begin.elapsed_time(end) for begin, end in spans)
        return milliseconds * 1e-3


def _event() -> Any:  # torch.cuda.Event, whose methods have no types
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
