"""How weights move: Muon and Adam, their rates over a training, and the average that is kept of them.

Knows nothing of what is learned. Shared by drafts and by the model that ships (deploy/model).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WARM_UP = 42  # steps


def optimizers_of(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, Adam for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    table = [p for name, p in named if "embed" in name]
    norms = [p for _, p in named if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=weight_decay)
    adam = torch.optim.Adam(
        [{"params": table, "lr": 4e-3}, {"params": norms, "lr": 2e-3}], betas=(0.9, 0.98), fused=True
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, progress: float) -> None:
    """Warm up, hold to 35% of the way, then fall along a cosine to a hundredth of the peak. `progress`
    is the share of the training that was done before this step."""
    rise = min(1.0, (step + 0.02) / WARM_UP)
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress - 0.35) / 0.65))
    factor = rise * (0.01 + 0.99 * fall)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def descend(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step down the gradient that was computed, clipped to a norm of 1."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def update_average(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights; its memory grows to 100 steps."""
    keep = min(0.99, (step + 1) / (step + 10))
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter.detach(), 1 - keep)
