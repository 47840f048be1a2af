"""A draft model changes no token, whatever becomes of it; and its drafts are of use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine import Engine, SamplingParams
from common.engine.core.sequence import Sequence as EngineSequence
from common.engine.speculation import guarded
from common.engine.speculation.drafting import CAUGHT_UP_AT_ONCE, Drafting, DraftSource
from common.engine.speculation.model import ModelSource
from common.engine.speculation.ngram import NGramSource
from common.engine.text import encode
from common.errors import ConfigError
from tests.integration.test_speculation import BASE, outputs
from tests.support.checkpoints import BABYLLAMA, DRAFT
from tests.support.engines import FreeRounds, NoCosts, poisoned_engine

STORY = "Once upon a time, there was a little girl named Lily. She"


def draft_engine(
    *sources: DraftSource,
    most: int = 8,
    model: Path | None = DRAFT,
    drafting: Any = Drafting,
    **settings: Any,
) -> Engine:
    proposer = drafting(sources or [ModelSource(512)], most, NoCosts(), FreeRounds(0.0))
    return poisoned_engine(proposer, speculative="draft", speculative_model=str(model), **settings)


def counts(engine: Engine, source: str = "draft") -> Any:
    assert engine.proposer is not None
    assert not engine.proposer.failures.count
    return engine.proposer.counts[source]


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], list[Any]]:
    return outputs(poisoned_engine())


@pytest.mark.parametrize(
    ("sources", "settings"),
    [
        ([ModelSource(512)], {}),
        ([NGramSource(), ModelSource(512)], {}),
        ([ModelSource(512)], {"most": 1}),
        ([NGramSource(), ModelSource(512)], {"most": 20, "max_num_batched_tokens": 24}),
        ([NGramSource(), ModelSource(512)], {"num_kv_blocks": 24, "max_num_seqs": 4}),  # preempts
        ([ModelSource(512)], {"enable_prefix_caching": False, "block_size": 4, "num_kv_blocks": 512}),
    ],
)
def test_a_draft_model_changes_no_token_no_logprob_and_no_end(
    plain: dict[tuple[str, int], list[Any]], sources: list[DraftSource], settings: dict[str, Any]
) -> None:
    engine = draft_engine(*sources, **settings)
    assert outputs(engine) == plain
    found = counts(engine)
    assert 100 < found.accepted < found.drafted
    assert not found.failures


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_story_takes_a_fraction_of_the_steps(temperature: float) -> None:
    """At any temperature: the drafts have the noise of their positions."""
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=3, ignore_eos=True)
    plain, engine = poisoned_engine(), draft_engine(most=4)
    prompt = encode(engine.facts.folder, STORY)
    (expected,), (reply,) = plain.generate([prompt], params), engine.generate([prompt], params)
    assert reply.token_ids == expected.token_ids
    assert engine.num_steps < 0.6 * plain.num_steps
    found = counts(engine)
    assert found.accepted > 0.5 * found.drafted


class Late(Drafting):
    """Asks the draft model for nothing before a sequence has many tokens."""

    def propose(self, sequences: Sequence[EngineSequence]) -> None:
        super().propose([s for s in sequences if s.num_generated > 2 * CAUGHT_UP_AT_ONCE])


def test_a_draft_model_that_was_not_asked_for_long_catches_up_first() -> None:
    params = SamplingParams(max_tokens=4 * CAUGHT_UP_AT_ONCE, temperature=0.0, ignore_eos=True)
    plain, engine = poisoned_engine(), draft_engine(drafting=Late, most=4)
    prompt = encode(engine.facts.folder, STORY)
    (expected,), (reply,) = plain.generate([prompt], params), engine.generate([prompt], params)
    assert reply.token_ids == expected.token_ids
    found = counts(engine)
    assert found.accepted > 0.4 * found.drafted > CAUGHT_UP_AT_ONCE / 4


def test_cached_blocks_that_the_draft_model_has_not_seen_are_computed_when_they_are_needed() -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine = draft_engine(most=4)
    prompt = encode(engine.facts.folder, " ".join([STORY] * 4))
    (sequence,) = engine.add_prompt("without", prompt, params)
    sequence.draft_model_follows = False
    while engine.has_work:
        engine.step()
    found = counts(engine)
    assert not found.drafted
    (reply,) = engine.generate([prompt], params)
    assert engine.pool.num_hit_blocks
    assert reply.token_ids == tuple(sequence.token_ids[len(prompt) :])
    assert found.accepted > 0.5 * found.drafted > 0
    steps = engine.num_steps
    engine.generate([prompt], params)
    assert engine.num_steps - steps < 0.6 * params.max_tokens
    engine.check_idle()


def changed_draft(folder: Path, change: Any = None, **config: Any) -> Path:
    shutil.copytree(DRAFT, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("where", ["in its KV", "in its logits"])
def test_a_draft_model_that_gives_no_numbers_costs_drafts_only(
    plain: dict[tuple[str, int], list[Any]], where: str
) -> None:
    engine = draft_engine()
    model = engine.runner.draft._model
    (model._norm if where == "in its logits" else model._layers[1].input_norm)[0] = float("nan")
    assert outputs(engine) == plain
    found = counts(engine)
    assert found.drafts <= len(plain), "each sequence tries once"
    assert found.accepted == 0


def test_a_draft_model_that_raises_costs_drafts_only_and_is_off_after_some_times(
    plain: dict[tuple[str, int], list[Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = draft_engine(NGramSource(), ModelSource(512))

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.runner.draft._model, "forward", fail)
    assert outputs(engine) == plain
    found = counts(engine)
    assert found.failures == 10
    assert counts(engine, "ngram").accepted
    lines = [record.getMessage() for record in caplog.records if record.name == "pdq.speculation"]
    assert lines == ["proposer.failed", "proposer.off"]


def test_an_engine_whose_draft_model_is_off_and_that_has_no_other_plans_ahead_again(
    plain: dict[tuple[str, int], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = draft_engine()

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.runner.draft._model, "forward", fail)
    monkeypatch.setattr(guarded, "MOST_FAILURES", 2)
    outputs(engine)
    assert engine.proposer is not None
    assert not engine.proposer.is_on
    engine.steps_ahead = 1
    assert outputs(engine) == plain
    engine.add_prompt("r", [5], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    engine.step()
    assert engine._submitted, "a step was submitted while the one before was computed"
    engine.abort("r")
    while engine.has_work:
        engine.step()
    engine.check_idle()


def test_a_draft_model_with_a_shorter_context_drafts_as_far_as_it_reaches(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    model = changed_draft(tmp_path / "draft", max_position_embeddings=64)
    plain, engine = poisoned_engine(), draft_engine(ModelSource(64), model=model)
    assert engine.facts.draft is not None
    assert engine.facts.draft.max_model_len == 64
    prompt = encode(engine.facts.folder, STORY)
    (expected,), (reply,) = plain.generate([prompt], params), engine.generate([prompt], params)
    assert reply.token_ids == expected.token_ids
    assert 0 < counts(engine).accepted < 64 - len(prompt)


@pytest.mark.parametrize("positions", [1, 16])
def test_a_rehearsal_goes_no_further_than_the_draft_model_reaches(tmp_path: Path, positions: int) -> None:
    model = changed_draft(tmp_path / "draft", max_position_embeddings=positions)
    engine = draft_engine(ModelSource(positions), model=model)
    engine.warm_up()
    assert not counts(engine).failures
    engine.check_idle()


def test_a_proposer_that_asks_for_more_than_the_draft_model_reaches_costs_drafts_only(
    plain: dict[tuple[str, int], list[Any]], tmp_path: Path
) -> None:
    engine = draft_engine(
        ModelSource(512), model=changed_draft(tmp_path / "draft", max_position_embeddings=64)
    )
    assert outputs(engine) == plain
    assert engine.proposer is not None
    assert engine.proposer.failures.count


@pytest.mark.parametrize("rows", [-100, 64])
def test_vocabularies_may_differ_in_their_padding(
    plain: dict[tuple[str, int], list[Any]], tmp_path: Path, rows: int
) -> None:
    """Models of one family often do: what one of them lacks is a token that nobody has."""

    def resize(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.embed_tokens.weight"]
        padding = torch.zeros(max(0, rows), weight.shape[1])
        tensors["model.embed_tokens.weight"] = torch.cat((weight[: 512 + min(0, rows)], padding))

    engine = draft_engine(model=changed_draft(tmp_path / "draft", resize, vocab_size=512 + rows))
    assert outputs(engine) == plain
    assert counts(engine).accepted


def test_a_request_may_ask_for_none(plain: dict[tuple[str, int], list[Any]]) -> None:
    engine = draft_engine()
    assert outputs(engine, speculative=False) == plain
    assert counts(engine).drafted == 0


def test_its_memory_is_in_the_plan_of_the_pool() -> None:
    """A pool of so many bytes has fewer blocks, since each holds the draft model's KV, too."""
    plain = poisoned_engine(num_kv_blocks=None, kv_cache_memory_bytes=1 << 20)
    engine = draft_engine(num_kv_blocks=None, kv_cache_memory_bytes=1 << 20)
    layers, drafts = 5, 2
    expected = plain.layout.slab_bytes * (layers + drafts) // layers
    assert engine.layout.slab_bytes == expected
    assert engine.facts.num_blocks == (1 << 20) // expected


@pytest.mark.parametrize(
    ("model", "says"), [(BABYLLAMA, "another tokenizer"), (Path("/nowhere/at/all"), "does not exist")]
)
def test_a_draft_model_that_does_not_pair_is_an_error_that_names_it(model: Path, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        draft_engine(model=model)
    assert says in raised.value.message
    assert str(model) in raised.value.message
    assert raised.value.param == "speculative_model"


def test_what_ships_drafts_for_what_ships() -> None:
    engine = Engine.load(speculative="draft", num_kv_blocks=64)
    (reply,) = engine.generate([[1, 50, 60]], BASE)
    assert engine.facts.draft is not None
    assert engine.facts.draft.name == "pdq-5m-draft"
    (expected,) = Engine.load(num_kv_blocks=64).generate([[1, 50, 60]], BASE)
    assert reply.token_ids == expected.token_ids


def test_of_many_sequences_one_at_a_time_catches_up() -> None:
    """So that a draft model of which nothing is known costs little to be tried."""
    engine = draft_engine(drafting=Late, most=4)
    params = SamplingParams(max_tokens=3 * CAUGHT_UP_AT_ONCE, temperature=0.0, ignore_eos=True)
    for index in range(6):
        engine.add_prompt(str(index), encode(engine.facts.folder, STORY), params)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, sum(sequence.catches_up for sequence in engine.scheduler.running))
    assert most == 1
    assert counts(engine).accepted
