"""What of a GPU decides how kernels are launched on it, and which bits they give."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    name: str  # of the product, without blanks
    capability: int  # ten times: 80, 90, 100
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.name.replace(" ", "-").replace("/", "-"),
            10 * found.major + found.minor,
            found.multi_processor_count,
        )
