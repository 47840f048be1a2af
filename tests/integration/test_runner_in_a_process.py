"""The wall between core and runner: a runner in another process computes the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from common.engine import Engine, SamplingParams, StepOutput
from common.engine.speculation import GuardedProposer, HostProposer
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.model import ModelSource
from common.settings.config import EngineSettings
from tests.support.checkpoints import DRAFT, STORIES
from tests.support.engines import FreeRounds, NoCosts, poisoned_engine
from tests.support.process_runner import ProcessRunner, read

SETTINGS = {
    "model": str(STORIES),
    "dtype": "float32",
    "threads": 1,
    "num_kv_blocks": 12,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
}
PROMPT = [1, 403, 407, 261, 378]
LONG = [1, 320, 321, 322, 323, 324, 325] * 9


class Truth(HostProposer):
    """Drafts what was generated before, now and then wrong."""

    name = "truth"

    def __init__(self, tokens: dict[tuple[str, int], list[int]]) -> None:
        self._tokens = tokens
        self.drafted = 0

    def propose(self, sequences: object) -> None:
        for sequence in sequences:  # type: ignore[attr-defined]
            known = len(sequence.token_ids)
            drafts = self._tokens[sequence.request_id, sequence.choice][known : known + 3]
            if known % 5 == 0 and drafts:
                drafts[-1] = 7
            sequence.draft_token_ids = drafts
            self.drafted += len(drafts)


@pytest.fixture(scope="module")
def apart() -> Iterator[Engine]:
    settings = EngineSettings(**SETTINGS)  # type: ignore[arg-type]
    runner = ProcessRunner(settings)
    yield Engine(settings, runner)
    runner.close()


def run(engine: Engine) -> list[tuple[object, ...]]:
    """All of it that a client could see, of prompts that together do not fit into the pool."""
    warm = SamplingParams(
        max_tokens=40,
        temperature=0.9,
        seed=5,
        ignore_eos=True,
        presence_penalty=0.7,
        repetition_penalty=1.2,
        logprobs=3,
        prompt_logprobs=2,
    )
    edited = SamplingParams(
        max_tokens=30,
        temperature=0.7,
        seed=6,
        top_p=0.9,
        min_tokens=9,
        logit_bias=((403, 5.0),),
        banned_token_ids=(261,),
    )
    engine.add_prompt("warm", LONG, warm, choices=range(3))
    engine.add_prompt("edited", PROMPT, edited)
    engine.add_prompt("greedy", LONG[:50], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    engine.add_prompt("gone", LONG, warm)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
        if engine.num_steps % 7 == 0:
            engine.abort("gone")
    engine.check_idle()
    return sorted(
        (o.request_id, o.choice, o.position, o.token_ids, o.logprobs, o.prompt_logprobs)
        for o in outputs
        if o.request_id != "gone"
    )  # type: ignore[return-value]


def by_choice(seen: list[tuple[object, ...]]) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    for request, choice, _, ids, *_ in seen:
        tokens.setdefault((request, choice), []).extend(ids)  # type: ignore[arg-type, call-overload]
    return tokens


@pytest.fixture(params=[0, 1], ids=["one step", "a step ahead"])
def steps_ahead(request: pytest.FixtureRequest, apart: Engine) -> Iterator[int]:
    """How many steps are planned before the one that is computed has ended."""
    apart.steps_ahead = request.param
    yield request.param
    apart.steps_ahead = 0


def test_a_runner_in_another_process_computes_the_same_bits(apart: Engine, steps_ahead: int) -> None:
    here = poisoned_engine(**SETTINGS)
    expected = run(here)
    assert here.scheduler.num_preemptions, "the pool was too large for this test"
    assert run(apart) == expected


def test_drafts_cross_and_change_nothing(apart: Engine, steps_ahead: int) -> None:
    here = poisoned_engine(**SETTINGS)
    tokens = by_choice(run(here))
    prompts = {"warm": LONG, "edited": PROMPT, "greedy": LONG[:50], "gone": []}
    truth = Truth({(r, c): prompts[r] + ids for (r, c), ids in tokens.items()} | {("gone", 0): []})
    apart.proposer = GuardedProposer(truth, apart.facts.vocab_size)
    try:
        assert by_choice(run(apart)) == tokens
    finally:
        apart.proposer = None
    assert truth.drafted > 100


def test_what_a_draft_model_is_to_do_and_what_came_of_it_cross_as_well() -> None:
    here = poisoned_engine(**SETTINGS)
    tokens = by_choice(run(here))
    settings = EngineSettings(**SETTINGS, speculative="draft", speculative_model=str(DRAFT))  # type: ignore[arg-type]
    runner = ProcessRunner(settings)
    proposer = Drafting([ModelSource(512)], 4, NoCosts(), FreeRounds(0.0))
    try:
        assert by_choice(run(Engine(settings, runner, proposer=proposer))) == tokens
    finally:
        runner.close()
    assert proposer.counts["draft"].accepted > 20


def test_a_step_that_fails_in_another_process_is_computed_again(
    apart: Engine, steps_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties count the same tokens afterwards, although the runner has forgotten its slots."""
    expected = by_choice(run(poisoned_engine(**SETTINGS)))
    submit, steps = apart.runner.submit, 0

    def fail_some(step: object, *rest: object) -> object:
        nonlocal steps
        steps += 1
        if steps % 11 == 0:
            if steps % 2 == 0:  # the runner has changed its slots, and the core does not know
                submit(step).result()  # type: ignore[arg-type]
            raise RuntimeError("the step failed")
        return submit(step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(apart.runner, "submit", fail_some)
    step = apart.step

    def patient() -> list[StepOutput]:
        try:
            return step()
        except RuntimeError:
            return []

    monkeypatch.setattr(apart, "step", patient)
    assert by_choice(run(apart)) == expected


def test_a_live_sequence_does_not_cross(apart: Engine) -> None:
    (sequence,) = apart.add_prompt("r", PROMPT, SamplingParams(max_tokens=1))
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        read(pickle.dumps(sequence))
    apart.abort("r")
