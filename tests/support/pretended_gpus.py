"""GPUs that are not there. A node takes them, and has the lease; what it computes, it computes on the CPU.

As a process, a real node: `python -m tests.support.pretended_gpus COUNT` and then the flags of a node.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence

from common.engine.runner.model_runner import ModelRunner, Storage
from common.gpu import Gpu
from common.node.__main__ import main
from common.node.gpus import take_gpu
from common.settings.config import EngineSettings
from tests.support.gpu_holder import TIMES


class PretendedGpus:
    """`Gpus`, `count` of them, or those of a host that CUDA_VISIBLE_DEVICES would leave."""

    def __init__(self, count: int, visible: Sequence[int] | None = None) -> None:
        self._physical = range(count) if visible is None else visible

    def visible(self) -> list[Gpu]:
        return [Gpu(i, f"GPU-{n:04}", "Pretended", 80 << 30) for i, n in enumerate(self._physical)]


class OnCpu(ModelRunner):
    """Computes on the CPU, whichever GPU it is given."""

    def __init__(self, settings: EngineSettings, *, storage: Storage | None = None) -> None:
        assert settings.device.startswith("cuda:"), settings.device
        super().__init__(dataclasses.replace(settings, device="cpu"), storage=storage)


if __name__ == "__main__":
    pretended = functools.partial(take_gpu, gpus=PretendedGpus(int(sys.argv[1])), times=TIMES)
    sys.exit(main(sys.argv[2:], make_runner=OnCpu, take_gpu=pretended))
