"""Speculation in a whole engine: the tokens are those of an engine that does not draft, in fewer steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from common.engine import Engine, SamplingParams
from common.engine.core.output import StepOutput
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.ngram import NGramSource
from common.errors import InvalidRequest
from common.identity import ModelIdentity
from common.request import Request
from tests.support.engines import NoCosts, poisoned_engine

REPETITIVE = list(itertools.islice(itertools.cycle(range(20, 33)), 60))
PROMPTS = {
    "repeats": REPETITIVE,
    "plain": list(range(300, 340)),
    "short": [5],
    "both": [*REPETITIVE[:30], 7, 8],
}
BASE = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
ALL = {
    "greedy": BASE,
    "warm": dataclasses.replace(BASE, temperature=0.9, seed=11),
    "cut": dataclasses.replace(BASE, temperature=1.3, top_k=8, top_p=0.9, min_p=0.02, seed=5),
    "penalties": dataclasses.replace(
        BASE, temperature=0.7, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, seed=2
    ),
    "bias": dataclasses.replace(BASE, logit_bias=((20, 4.0), (21, -4.0)), banned_token_ids=(22,), seed=3),
    "logprobs": dataclasses.replace(BASE, temperature=0.5, logprobs=3, seed=4),
    "stops": dataclasses.replace(
        BASE, ignore_eos=False, temperature=1.0, stop_token_ids=(260, 263), min_tokens=5
    ),
}


FEW = ("greedy", "penalties", "logprobs", "stops")  # for what is no matter of sampling


def ngram_engine(most: int = 8, **settings: Any) -> Engine:
    return poisoned_engine(Drafting([NGramSource()], most, NoCosts()), **settings)


def outputs(
    engine: Engine, kinds: Sequence[str] = tuple(ALL), **fields: Any
) -> dict[tuple[str, int], list[Any]]:
    """Tokens, log probabilities and ends of all prompts under these parameters, by request and choice."""
    found: dict[tuple[str, int], list[StepOutput]] = {}
    for (name, prompt), kind in itertools.product(PROMPTS.items(), kinds):
        model = ModelIdentity.of(engine.fingerprint)
        request = Request(name, model, tuple(prompt), len(prompt), ALL[kind], **fields)
        engine.add(f"{name}-{kind}", request, choices=(0, 1))
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.choice), []).append(output)
    engine.check_idle()
    for output in itertools.chain(*found.values()):
        assert 0 <= output.accepted <= output.drafted
        assert len(output.token_ids) - output.accepted in ((0, 1) if output.finish_reason else (1,))
    return {
        key: [
            [token for output in parts for token in output.token_ids],
            [entry for output in parts for entry in output.logprobs],
            parts[-1].finish_reason,
        ]
        for key, parts in found.items()
    }


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], list[Any]]:
    return outputs(poisoned_engine())


def drafting(engine: Engine) -> Drafting:
    assert engine.proposer is not None
    assert isinstance(engine.proposer.inner, Drafting)
    return engine.proposer.inner


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"most": 1},
        {"most": 30, "max_num_batched_tokens": 24},
        {"num_kv_blocks": 24, "max_num_seqs": 4},  # preempts
        {"enable_prefix_caching": False, "block_size": 4, "num_kv_blocks": 512},
    ],
)
def test_ngram_changes_no_token_no_logprob_and_no_end(
    plain: dict[tuple[str, int], list[Any]], settings: dict[str, Any]
) -> None:
    engine = ngram_engine(**settings)
    assert outputs(engine) == plain
    counts = drafting(engine).counts["ngram"]
    assert 0 < counts.accepted < counts.drafted
    assert not drafting(engine)._acceptance, "nothing is kept of what has ended"


def test_what_repeats_takes_fewer_steps() -> None:
    steps = []
    for engine in (poisoned_engine(), ngram_engine()):
        engine.warm_up()
        before = engine.num_steps
        params = dataclasses.replace(BASE, logit_bias=tuple((token, 100.0 - token) for token in (20,)))
        engine.generate([REPETITIVE], params)
        steps.append(engine.num_steps - before)
    assert steps[1] < steps[0] / 2


def test_a_prediction_is_followed_as_far_as_it_is_right() -> None:
    plain_engine, engine = poisoned_engine(), ngram_engine()
    prompt = PROMPTS["plain"]
    (whole,) = plain_engine.generate([prompt], BASE)
    prediction = (*whole.token_ids[:20], 3, *whole.token_ids[21:])
    request = Request(
        "r", ModelIdentity.of(engine.fingerprint), tuple(prompt), len(prompt), BASE, prediction=prediction
    )
    engine.add("r", request)
    parts: list[tuple[int, ...]] = []
    while engine.has_work:
        parts += [output.token_ids for output in engine.step()]
    assert tuple(itertools.chain(*parts)) == whole.token_ids
    assert len(parts) < len(whole.token_ids) / 2
    assert len(parts[0]) == 1 < len(parts[1]), "from the second token on"


def test_a_request_may_ask_for_none(plain: dict[tuple[str, int], list[Any]]) -> None:
    engine = poisoned_engine(speculative="ngram")
    assert outputs(engine, speculative=False) == plain
    assert drafting(engine).counts["ngram"].drafted == 0


@pytest.mark.parametrize("token", [-1, 512, 2**70])
def test_a_prediction_outside_the_vocabulary_is_the_clients_error(token: int) -> None:
    """It would be computed as a draft, and fail the step of everybody in it."""
    engine = poisoned_engine(speculative="ngram")
    model = ModelIdentity.of(engine.fingerprint)
    with pytest.raises(InvalidRequest) as raised:
        engine.add("r", Request("r", model, (1, 2), 2, BASE, prediction=(3, token)))
    assert raised.value.param == "prediction"
    engine.check_idle()


class Failing(Drafting):
    """Raises in one of its methods, each time, or drafts what is no token."""

    def __init__(self, fault: str) -> None:
        super().__init__([NGramSource()], 8, NoCosts())
        self._fault = fault

    def propose(self, sequences: Sequence[Any]) -> None:
        super().propose(sequences)
        bad = {"below": [-1], "beyond": [512], "nothing": [None], "fraction": [20.0], "no list": None}
        for sequence in sequences:
            if self._fault in bad:
                sequence.draft_token_ids = bad[self._fault]
        self._fail("propose")

    def observe(self, *arguments: Any) -> None:
        self._fail("observe")
        super().observe(*arguments)

    def ended(self, sequence: Any) -> None:
        super().ended(sequence)
        self._fail("ended")

    def _fail(self, where: str) -> None:
        if where == self._fault:
            raise RuntimeError(f"{where} is broken")


@pytest.fixture(scope="module")
def few() -> dict[tuple[str, int], list[Any]]:
    return outputs(poisoned_engine(), FEW)


@pytest.mark.parametrize(
    "fault", ["propose", "observe", "ended", "below", "beyond", "nothing", "fraction", "no list"]
)
def test_a_proposer_that_fails_costs_drafts_only_and_is_off_after_some_times(
    few: dict[tuple[str, int], list[Any]], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = poisoned_engine(Failing(fault))
    assert outputs(engine, FEW) == few
    assert engine.proposer is not None
    assert not engine.proposer.is_on
    drafted = engine.proposer.counts["ngram"].drafted
    assert outputs(engine, FEW) == few, "and so does one that is off"
    assert engine.proposer.counts["ngram"].drafted == drafted
    lines = [record for record in caplog.records if record.name == "pdq.speculation"]
    assert [line.getMessage() for line in lines] == ["proposer.failed", "proposer.off"]
    assert [line.exc_info is not None for line in lines] == [True, False]


def test_an_engine_whose_proposer_is_off_plans_ahead_again() -> None:
    engine = poisoned_engine(Failing("propose"))
    engine.add_prompt("r", REPETITIVE, BASE)
    engine.step()
    assert engine.proposer is not None
    while engine.proposer.is_on:
        first = engine.plan()
        assert first is not None
        ahead = engine.plan()
        assert (ahead is None) == engine.proposer.is_on
        engine.commit(first, engine.runner.submit(first.input).result())
    assert ahead is not None
    engine.commit(ahead, engine.runner.submit(ahead.input).result())
    engine.abort("r")
    engine.check_idle()
