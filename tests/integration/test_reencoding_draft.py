"""A draft model with another tokenizer drafts by its text, and changes no token either."""

from __future__ import annotations

from typing import Any

import pytest

from common.engine import Engine, SamplingParams
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.model import ModelSource
from common.engine.text import encode
from common.errors import ConfigError
from tests.integration.test_draft_model import STORY, counts
from tests.integration.test_speculation import FEW, outputs
from tests.support.checkpoints import BABYLLAMA, STORIES
from tests.support.engines import FreeRounds, NoCosts, poisoned_engine


def by_text(most: int = 4, **settings: Any) -> Engine:
    proposer = Drafting([ModelSource(512)], most, NoCosts(), FreeRounds(0.0))
    fields: dict[str, Any] = {"speculative_model": str(BABYLLAMA), "speculative_by_text": True}
    return poisoned_engine(proposer, speculative="draft", **(fields | settings))


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], list[Any]]:
    return outputs(poisoned_engine(), FEW)


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 24, "max_num_seqs": 4}])
def test_it_changes_no_token_no_logprob_and_no_end(
    plain: dict[tuple[str, int], list[Any]], settings: dict[str, Any]
) -> None:
    engine = by_text(**settings)
    assert outputs(engine, FEW) == plain
    found = counts(engine)
    assert 100 < found.accepted < found.drafted
    assert not found.failures


@pytest.mark.parametrize(("model", "draft"), [(STORIES, BABYLLAMA), (BABYLLAMA, STORIES)])
def test_a_story_takes_fewer_steps_either_way(model: Any, draft: Any) -> None:
    """Far beyond what the draft model reads at once."""
    params = SamplingParams(max_tokens=190, temperature=0.0, ignore_eos=True)
    plain = poisoned_engine(model=str(model))
    engine = by_text(model=str(model), speculative_model=str(draft))
    prompt = encode(engine.facts.folder, STORY)
    (expected,), (reply,) = plain.generate([prompt], params), engine.generate([prompt], params)
    assert reply.token_ids == expected.token_ids
    assert engine.num_steps < 0.6 * plain.num_steps
    assert counts(engine).accepted > 80


def test_what_it_has_forgotten_it_is_told_again(plain: dict[tuple[str, int], list[Any]]) -> None:
    engine = by_text()
    del engine.runner.draft._free[2:]  # more sequences than it can read at once
    assert outputs(engine, FEW) == plain
    assert counts(engine).drafted
    assert len(engine.runner.draft._readings) + len(engine.runner.draft._free) == 2


def test_no_numbers_cost_drafts_only(plain: dict[tuple[str, int], list[Any]]) -> None:
    engine = by_text()
    engine.runner.draft._model._norm[0] = float("nan")
    assert outputs(engine, FEW) == plain
    assert counts(engine).accepted < 5, "a token that stands in may be right"


def test_an_error_costs_drafts_only(
    plain: dict[tuple[str, int], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = by_text(), 0
    forward = engine.runner.draft._model.forward

    def fail_some(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (5, 40, 41):
            raise RuntimeError("out of luck")
        return forward(*arguments)

    monkeypatch.setattr(engine.runner.draft._model, "forward", fail_some)
    assert outputs(engine, FEW) == plain
    found = counts(engine)
    assert found.failures == 3
    assert found.accepted > 100


def test_another_tokenizer_needs_the_setting_and_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match=r"another tokenizer.*speculative_by_text") as raised:
        by_text(speculative_by_text=False)
    assert raised.value.param == "speculative_model"


def test_its_kv_is_no_part_of_the_slabs() -> None:
    """So that nodes with it and without it hand sequences to each other."""
    engine, plain = by_text(), poisoned_engine()
    assert engine.layout == plain.layout
    assert engine.fingerprint == plain.fingerprint
