"""Ways to look into an engine that users do not have: the logits it computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from common.engine import Engine, SamplingParams
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import Rows
from common.engine.runner.load_runner import load_runner
from common.engine.runner.loaded_model import Storage
from common.engine.runner.queue_runner import QueueRunner
from common.engine.speculation import HostProposer
from common.engine.speculation.lengths import RoundCosts, StepCosts
from common.settings.config import EngineSettings
from tests.support.checkpoints import STORIES


@contextmanager
def watched_hidden_states(engine: Engine, watch: Callable[[Rows, Tensor], None]) -> Iterator[None]:
    """Call `watch` with the rows and hidden states of every step."""
    original = engine.runner.model.forward

    def forward(rows: Rows, cache: KVCache) -> Tensor:
        hidden = original(rows, cache)
        watch(rows, hidden)
        return hidden

    engine.runner.model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.runner.model.forward = original  # type: ignore[method-assign]


def prompt_logits(engine: Engine, token_ids: list[int]) -> Tensor:
    """Logits of every position of a prompt, float32 `[len(token_ids), vocab]`, by a real run."""
    logits = torch.full((len(token_ids), engine.runner.config.vocab_size), float("nan"))

    def watch(rows: Rows, hidden: Tensor) -> None:
        for first_row, count, position in rows.prompt_chunks:
            logits[position : position + count] = engine.runner.model.logits(
                hidden[first_row : first_row + count]
            ).float()

    with watched_hidden_states(engine, watch):
        engine.generate([token_ids], SamplingParams(max_tokens=1, temperature=0.0))
    assert not logits.isnan().any()
    return logits


def poisoned_engine(host_proposer: HostProposer | None = None, **settings: Any) -> Engine:
    """The stories model in float32, with NaN in every block that nobody holds."""
    fields: dict[str, Any] = {
        "model": str(STORIES),
        "dtype": "float32",
        "threads": 1,
        "num_kv_blocks": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
    }
    return with_poison(EngineSettings(**(fields | settings)), host_proposer=host_proposer)


def with_poison(
    settings: EngineSettings,
    *,
    storage: Storage | None = None,
    on_free: Callable[[Sequence[int]], None] | None = None,
    host_proposer: HostProposer | None = None,
) -> Engine:
    """An engine that computes in the thread that calls it, with NaN in every block that nobody holds;
    `on_free` hears of those first."""
    runner = load_runner(settings, storage=storage)

    def poison(block_ids: Sequence[int]) -> None:
        work = functools.partial(runner.cache.poison, block_ids)
        if isinstance(runner, QueueRunner):
            runner._queue.run(work)
        else:
            work()

    def freed(block_ids: Sequence[int]) -> None:
        if on_free is not None:
            on_free(block_ids)
        poison(block_ids)

    poison(range(runner.facts.num_blocks))

    return Engine(settings, runner, proposer=host_proposer, on_free=freed)


class NoCosts(StepCosts):
    """A row more costs nothing, so that all that is drafted is verified, however long steps take."""

    def took(self, rows: int, seconds: float) -> bool:
        return False


class FreeRounds(RoundCosts):
    """The draft model costs nothing, so that it always drafts, however long it takes."""

    def of(self, members: int, steps: StepCosts) -> float:
        return 0.0
