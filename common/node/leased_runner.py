"""A runner that computes only while its process has the lease on its GPU (gpu_lease.py)."""

from __future__ import annotations

from concurrent.futures import Future

from common.engine.interface import EngineFacts, Filled, Runner, StepInput, StepResult
from common.errors import EngineBroken
from common.node.gpu_lease import GpuLease


class LeasedRunner:
    """Implements `Runner`, for the thread that computes."""

    def __init__(self, inner: Runner, lease: GpuLease) -> None:
        self.inner, self._lease = inner, lease

    @property
    def facts(self) -> EngineFacts:
        return self.inner.facts

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        """As soon as the GPU is certain to be ours; `EngineBroken` if it is not."""
        self._lease.require()
        return self.inner.submit(step, filled)

    def is_lost(self, error: BaseException, /) -> bool:
        return isinstance(error, EngineBroken) or self.inner.is_lost(error)

    def close(self, within_s: float | None = None) -> None:
        self.inner.close(within_s)
