"""A computed step has ended on its device: what it wrote may be copied by another process."""

from __future__ import annotations

import pytest

from common.engine import SamplingParams
from tests.support.engines import poisoned_engine


def test_the_device_is_waited_for_also_by_a_step_that_samples_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = poisoned_engine(max_num_batched_tokens=16)
    waits: list[int] = []
    monkeypatch.setattr(engine.runner.device, "synchronize", lambda: waits.append(1))
    engine.add_prompt("request", list(range(3, 51)), SamplingParams(max_tokens=1, temperature=0.0))
    step = engine.plan()
    assert step is not None
    assert not len(step.sampling), "the first chunk of three"
    computed = engine.runner.run(step.input)
    assert waits == [1]
    engine.commit(step, computed)
