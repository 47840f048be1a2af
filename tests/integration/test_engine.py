"""The engine as its users see it: batching, choices, logprobs, replays, failures, an idle pool."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from common.engine import Engine, FinishReason, SamplingParams
from common.engine.devices.cpu.device import CpuDevice
from common.engine.devices.rows import Rows
from common.engine.interface import StepInput, StepResult
from common.engine.runner.model_runner import ModelRunner
from common.errors import (
    ConfigError,
    ContextLengthExceeded,
    InsufficientMemory,
    InvalidRequest,
    NeverFits,
    NotFiniteLogits,
    TokenOutOfRange,
)
from tests.support.checkpoints import STORIES, transformers_model
from tests.support.engines import poisoned_engine, watched_hidden_states

PROMPTS = [[1, 403, 407, 261, 378], [1, 300], [1, 320, 321, 322, 323, 324, 325] * 9, [1] * 40]


def sampled(count: int = 40, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.9, seed=7, ignore_eos=True, **fields)  # type: ignore[arg-type]


def test_a_list_of_prompts_gets_what_each_gets_alone() -> None:
    engine = poisoned_engine()
    together = engine.generate(PROMPTS, sampled())
    engine.check_idle()
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = poisoned_engine().generate([prompt], sampled())
        assert alone.token_ids == completion.token_ids


def test_text_in_text_out() -> None:
    engine = poisoned_engine()
    (completion,) = engine.generate(["Once upon a time"], SamplingParams(max_tokens=20, temperature=0.0))
    assert completion.text is not None
    assert "there was a little girl named Lily" in completion.text


def test_a_sequence_joins_and_leaves_between_steps() -> None:
    engine = poisoned_engine()
    engine.add_prompt("first", PROMPTS[0], sampled(30))
    seen: dict[str, list[int]] = {"first": [], "second": []}
    while engine.has_work:
        for output in engine.step():
            assert output.position == len(PROMPTS[0] if output.request_id == "first" else PROMPTS[1]) + len(
                seen[output.request_id]
            )
            seen[output.request_id] += output.token_ids
            if output.request_id == "first" and len(seen["first"]) == 5:
                engine.add_prompt("second", PROMPTS[1], sampled(10))
    alone = poisoned_engine().generate(PROMPTS[:2], [sampled(30), sampled(10)])
    assert [tuple(seen["first"]), tuple(seen["second"])] == [c.token_ids for c in alone]


def test_how_prompts_are_cut_by_what_steps_took_leaves_no_trace_in_the_tokens() -> None:
    def run(row_s: float) -> tuple[list[int], dict[str, list[int]]]:
        """Prompt tokens of each step that has any, and what was generated, where a step takes so long."""
        engine, cut, tokens = poisoned_engine(target_itl_s=1.0), [], defaultdict[str, list[int]](list)

        def compute(step: StepInput) -> Future[StepResult]:
            cut.append(int(step.lengths[step.num_generated :].sum()))
            result = ModelRunner.run(engine.runner, step)
            future = Future[StepResult]()
            future.set_result(dataclasses.replace(result, seconds=row_s * int(step.lengths.sum())))
            return future

        engine.runner.submit = compute  # type: ignore[method-assign]
        engine.add_prompt("chat", PROMPTS[0], sampled(30))
        engine.step()
        engine.add_prompt("long", [1, 320, 321, 322, 323] * 48, sampled(10))
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
        engine.check_idle()
        return [count for count in cut if count], tokens

    (whole, as_whole), (cut, as_cut) = run(row_s=1e-6), run(row_s=0.01)
    assert whole == [5, 240]
    assert len(cut) > len(whole)
    assert as_cut == as_whole


def test_choices_share_the_prompt_and_differ_by_their_noise() -> None:
    engine = poisoned_engine()
    prompt = PROMPTS[2]  # ends inside a block: the shared tail is copied on the first write
    engine.add_prompt("r", prompt, sampled(30), choices=range(4))
    engine.step()
    shared = -(-len(prompt) // engine.layout.block_size)
    assert engine.pool.num_used == shared
    engine.step()
    assert engine.pool.num_used == shared - 1 + 4
    engine.abort("r")
    engine.check_idle()
    completions = engine.generate([prompt], sampled(30), n=4)
    assert len({c.token_ids for c in completions}) == 4
    for completion in completions:
        engine.add_prompt("one", prompt, sampled(30), choices=[completion.choice])
        tokens: list[int] = []
        while engine.has_work:
            tokens += [t for output in engine.step() for t in output.token_ids]
        assert tuple(tokens) == completion.token_ids
    engine.check_idle()


def test_logprobs_are_those_of_the_model() -> None:
    engine = poisoned_engine()
    prompt = PROMPTS[0]
    params = sampled(12, logprobs=3, prompt_logprobs=2)
    (completion,) = engine.generate([prompt], params)
    ids = [*prompt, *completion.token_ids]
    with torch.inference_mode():
        expected = transformers_model(STORIES)(torch.tensor([ids])).logits[0].log_softmax(-1)
    for index, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + index]
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert entry.rank == int((row > row[token]).sum()) + 1
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
    assert completion.prompt_logprobs is not None
    assert completion.prompt_logprobs[0] is None
    for position, entry in enumerate(completion.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert len(entry.top) == 2
        assert entry.logprob == pytest.approx(float(expected[position - 1][prompt[position]]), abs=1e-3)
    assert len(completion.prompt_logprobs) == len(prompt)


def test_prompt_logprobs_survive_chunks_and_preemption() -> None:
    prompt = list(range(5, 165))
    params = SamplingParams(max_tokens=60, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    (whole,) = poisoned_engine().generate([prompt], params)
    engine = poisoned_engine(num_kv_blocks=16, max_num_batched_tokens=48)
    several = engine.generate([prompt, prompt[1:], prompt[:9]], params)
    assert several[0].prompt_logprobs == whole.prompt_logprobs
    assert [len(c.prompt_logprobs or ()) for c in several] == [160, 159, 9]
    engine.check_idle()


@pytest.mark.parametrize("of_whole_blocks", [False, True])
def test_a_repeated_prompt_is_served_from_the_cache_with_the_same_tokens(of_whole_blocks: bool) -> None:
    engine = poisoned_engine()
    size = engine.layout.block_size
    rest = 1 if of_whole_blocks else len(PROMPTS[2]) % size
    prompt = PROMPTS[2][: len(PROMPTS[2]) // size * size] if of_whole_blocks else PROMPTS[2]
    computed: list[int] = []

    def watch(rows: object, hidden: Tensor) -> None:
        computed.append(sum(count for _, count, _ in rows.prompt_chunks))  # type: ignore[attr-defined]

    with watched_hidden_states(engine, watch):
        first = engine.generate([prompt], sampled())
        cold = sum(computed)
        again = engine.generate([prompt], sampled())
    assert cold == len(prompt)
    assert sum(computed) - cold == rest > 0
    assert first[0].token_ids == again[0].token_ids


def slabs(engine: Engine) -> dict[bytes, Tensor]:
    """The content of all cached blocks, by hash."""
    pool, content = engine.pool, engine.runner.cache.slabs
    blocks = {pool.hash_of(block): content[block].clone() for block in range(pool.num_blocks)}
    return {name: content for name, content in blocks.items() if name is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reply_is_a_prefix_of_the_next_turn(dtype: str) -> None:
    """Its blocks were generated, one token after the other, and have the bits of those of a prompt."""
    engine = poisoned_engine(dtype=dtype)
    (reply,) = engine.generate([PROMPTS[2]], sampled(40))
    turn = [*PROMPTS[2], *reply.token_ids, *PROMPTS[1][:5]]
    size = engine.layout.block_size
    hits = engine.pool.num_hit_blocks
    (again,) = engine.generate([turn], sampled(40))
    computed = len(PROMPTS[2]) + 40 - 1  # the last token was sampled, and not computed
    assert engine.pool.num_hit_blocks - hits == computed // size
    fresh = poisoned_engine(dtype=dtype)
    (cold,) = fresh.generate([turn], sampled(40))
    assert again.token_ids == cold.token_ids
    generated, computed_as_prompt = slabs(engine), slabs(fresh)
    assert generated.keys() >= computed_as_prompt.keys()
    for name, content in computed_as_prompt.items():
        assert torch.equal(generated[name], content)


def test_a_salt_keeps_tenants_apart() -> None:
    engine = poisoned_engine()
    for salt in ("one", "other"):
        engine.add_prompt(salt, PROMPTS[2], sampled(1), cache_salt=salt)
        computed = 0
        while engine.has_work:
            engine.step()
            computed += 1
    assert engine.pool.num_hit_blocks == 0


def test_a_replay_goes_on_with_the_same_tokens() -> None:
    prompt = PROMPTS[2]
    (whole,) = poisoned_engine().generate([prompt], sampled(40, presence_penalty=0.5))
    for delivered in (1, 7, 39):
        engine = poisoned_engine()
        ids = [*prompt, *whole.token_ids[:delivered]]
        engine.add_prompt("again", ids, sampled(40, presence_penalty=0.5), prompt_len=len(prompt))
        tokens: list[int] = []
        while engine.has_work:
            for output in engine.step():
                assert output.position == len(ids) + len(tokens)
                tokens += output.token_ids
        assert tuple(tokens) == whole.token_ids[delivered:]
        engine.check_idle()


def test_any_stop_id_of_the_list_ends_a_sequence() -> None:
    engine = poisoned_engine()
    assert engine.facts.stop_token_ids == (2, 1)
    (free,) = engine.generate([[1, 403]], SamplingParams(max_tokens=490, temperature=0.0))
    assert free.finish_reason is FinishReason.STOP
    assert free.token_ids[-1] in (1, 2)
    third = free.token_ids[2]
    (stopped,) = engine.generate(
        [[1, 403]], SamplingParams(max_tokens=490, temperature=0.0, stop_token_ids=(third,))
    )
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(third) + 1]


def test_abort_frees_everything_at_any_moment() -> None:
    for steps in range(6):
        engine = poisoned_engine(max_num_batched_tokens=32)
        engine.add_prompt("r", PROMPTS[2], sampled(presence_penalty=1.0, prompt_logprobs=1), choices=range(3))
        engine.add_prompt("other", PROMPTS[0], sampled(3))
        for _ in range(steps):
            engine.step()
        engine.abort("r")
        engine.abort("unknown")
        while engine.has_work:
            assert all(output.request_id == "other" for output in engine.step())
        engine.check_idle()


def test_a_failed_step_is_computed_again() -> None:
    engine = poisoned_engine()
    engine.add_prompt("r", PROMPTS[0], sampled(10))
    tokens: list[int] = []
    original, failures = engine.runner.model.forward, iter([False, True, False, True, True])

    def forward(*arguments: object) -> Tensor:
        if next(failures, False):
            raise RuntimeError("a kernel crashed")
        return original(*arguments)  # type: ignore[arg-type]

    engine.runner.model.forward = forward  # type: ignore[method-assign, assignment]
    crashes = 0
    while engine.has_work:
        try:
            tokens += [t for output in engine.step() for t in output.token_ids]
        except RuntimeError:
            crashes += 1
    assert crashes == 3
    (expected,) = poisoned_engine().generate([PROMPTS[0]], sampled(10))
    assert tuple(tokens) == expected.token_ids
    engine.check_idle()


def test_logits_that_are_not_finite_fail_their_sequence_only() -> None:
    engine = poisoned_engine()
    engine.add_prompt("bad", [1, 500], sampled(5))
    engine.add_prompt("good", [1, 403], sampled(5))
    ended = {}

    def damage(rows: Rows, hidden: Tensor) -> None:
        with torch.inference_mode():
            hidden[rows.token_ids == 500] = float("nan")

    with watched_hidden_states(engine, damage):
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason is not None:
                    ended[output.request_id] = output
    assert isinstance(ended["bad"].error, NotFiniteLogits)
    assert ended["bad"].finish_reason is FinishReason.ERROR
    assert ended["good"].finish_reason is FinishReason.LENGTH
    engine.check_idle()


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "error", "param"),
    [
        ([], 4, InvalidRequest, "prompt"),
        ([1] * 513, 1, ContextLengthExceeded, None),
        ([1] * 500, 13, ContextLengthExceeded, None),
        ([1] * 300, 1, NeverFits, None),
        ([1, 512], 4, TokenOutOfRange, "prompt"),
        ([1, -1], 4, TokenOutOfRange, "prompt"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    token_ids: list[int], max_tokens: int, error: type[Exception], param: str | None
) -> None:
    engine = poisoned_engine(num_kv_blocks=16)
    with pytest.raises(error) as raised:
        engine.add_prompt("r", token_ids, SamplingParams(max_tokens=max_tokens))
    if param is not None:
        assert raised.value.param == param  # type: ignore[attr-defined]
    assert not engine.has_work
    engine.check_idle()


def test_token_ids_of_parameters_are_checked_too() -> None:
    engine = poisoned_engine()
    with pytest.raises(InvalidRequest, match="logit_bias names token id 512"):
        engine.add_prompt("r", [1], SamplingParams(logit_bias=((512, 1.0),)))


def test_the_pool_has_the_size_that_was_asked_for() -> None:
    assert Engine.load(STORIES, num_kv_blocks=37).pool.num_blocks == 37
    engine = Engine.load(STORIES, dtype="float32", kv_cache_memory_bytes=1 << 20)
    assert engine.pool.num_blocks == (1 << 20) // engine.layout.slab_bytes
    with pytest.raises(InsufficientMemory, match=r"does not fit into \d+ MiB.*--num-kv-blocks"):
        Engine.load(STORIES, num_kv_blocks=1 << 40)
    with pytest.raises(InsufficientMemory, match="hold no block"):
        Engine.load(STORIES, kv_cache_memory_bytes=100)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "free_memory", lambda device: 1 << 19)
    with pytest.raises(InsufficientMemory, match=r"the weights take \d+ MiB as float32.*smaller"):
        Engine.load(STORIES, dtype="float32")


def test_unknown_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting max_sequences"):
        Engine.load(STORIES, max_sequences=3)
    with pytest.raises(ConfigError, match="beyond the model's 512"):
        Engine.load(STORIES, max_model_len=513)
    with pytest.raises(ConfigError, match="does not exist"):
        Engine.load("./no/such/folder")
