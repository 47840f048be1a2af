"""Which cores each node gets, and what is left for the gateway and Redis.

Owns: the division. Two processes that compute on one core slow each other down far more than
twofold, and the thread count is part of the numerics class: hence disjoint shares of equal size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

ROOMY = 4
"""From so many cores per node on, one of them is better spent on the gateway."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """`nodes[i]` are the cores of node i, `rest` those of everything else; `note` is for people,
    or empty."""

    nodes: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...]
    note: str


def divide(cores: Sequence[int], num_nodes: int) -> Shares:
    """Equal disjoint shares; where there are fewer cores than nodes, one core each, in turn."""
    count = len(cores)
    if count < num_nodes:
        turns = tuple((cores[node % count],) for node in range(num_nodes))
        what = "1 core" if count == 1 else f"{count} cores"
        note = f"{num_nodes} nodes take turns on {what}: they slow each other down"
        return Shares(turns, tuple(cores), note)
    each = count // num_nodes
    if each * num_nodes == count and each >= ROOMY:
        each -= 1
    shares = tuple(tuple(cores[node * each : (node + 1) * each]) for node in range(num_nodes))
    return Shares(shares, tuple(cores[num_nodes * each :]) or tuple(cores), "")


def shown(cores: Sequence[int]) -> str:
    """`core 3`, `cores 0-3,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"core {text}" if len(cores) == 1 else f"cores {text}"
