"""The GPUs that torch sees. Who may have which is decided elsewhere (common/node/gpus.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.gpu import Gpu


class TorchGpus:
    """`Gpus`. Allocates nothing on any of them."""

    def visible(self) -> Sequence[Gpu]:
        if not torch.cuda.is_available():
            return ()
        return [self._gpu(index) for index in range(torch.cuda.device_count())]

    def _gpu(self, index: int) -> Gpu:
        properties = torch.cuda.get_device_properties(index)
        kind = "MIG" if " MIG " in properties.name else "GPU"
        return Gpu(index, f"{kind}-{properties.uuid}", properties.name, properties.total_memory)
