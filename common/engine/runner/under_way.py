"""A step that was given to a device with a queue, until its results are read."""

from __future__ import annotations

import dataclasses

from common.engine.devices.queue import Event
from common.engine.interface import DraftReport, StepInput
from common.engine.runner.step_arrays import StepArrays
from common.engine.runner.step_layout import Split
from common.engine.runner.step_memory import StepMemory
from common.engine.sampling.records import TokenLogprob

GENERATED, REST = "generated", "rest"  # names of the parts' arrays


@dataclasses.dataclass(slots=True)
class UnderWay:
    """A step that was given to the device."""

    step: StepInput
    memory: StepMemory
    split: Split
    results: StepArrays
    blocks: dict[int, list[int]]  # that it fills, by the id of their sequence
    most_logprobs: int  # that a row asks for; -1: none does
    drafted: DraftReport | None
    begun: float
    filled: Event | None = None
    done: Event | None = None
    scored: tuple[tuple[TokenLogprob, ...], ...] = ()  # there when it is done
