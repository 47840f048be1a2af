"""What goes wrong in an engine stays with the request it belongs to, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import numba
import pytest
import torch
from torch import Tensor

from common.engine import Engine, FinishReason, SamplingParams, StepOutput
from common.engine.core.engine_core import StepNotBuilt
from common.engine.devices.cuda.device import CudaDevice
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import Rows
from common.engine.runner.soundness import filled_blocks
from common.engine.speculation import HostProposer
from common.errors import CheckpointError, ConfigError, InvalidRequest, NotFiniteLogits, PdqError
from common.settings.config import EngineSettings
from tests.support.checkpoints import STORIES, save_random_model
from tests.support.engines import poisoned_engine, watched_hidden_states

PROMPT = [1, 403, 407, 261, 378]
LONG = [1, 320, 321, 322, 323, 324, 325] * 9


def greedy(count: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def run(engine: Engine) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    engine.check_idle()
    return outputs


def test_generate_leaves_nothing_behind_when_a_prompt_is_refused() -> None:
    engine = poisoned_engine()
    with pytest.raises(InvalidRequest):
        engine.generate([PROMPT, [9999]], greedy(5))
    engine.check_idle()
    with pytest.raises(InvalidRequest, match="1 params for 2 prompts"):
        engine.generate([PROMPT, PROMPT], [greedy(5)])
    engine.check_idle()


def test_generate_leaves_nothing_behind_when_a_step_crashes() -> None:
    engine = poisoned_engine()

    def crash(rows: Rows, hidden: Tensor) -> None:
        raise RuntimeError("a kernel crashed")

    with watched_hidden_states(engine, crash), pytest.raises(RuntimeError, match="crashed"):
        engine.generate([PROMPT, LONG], greedy(5), n=2)
    engine.check_idle()


def test_a_broken_tokenizer_is_found_at_load(tmp_path: Path) -> None:
    for path in STORIES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{nonsense")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Engine.load(tmp_path, num_kv_blocks=8)


@pytest.mark.parametrize("token_ids", [[1.7, 2.0], [2**70], ["a"], [[1, 2]], [None], "text"])
def test_a_prompt_that_is_no_list_of_integers_is_refused(token_ids: list[int]) -> None:
    engine = poisoned_engine()
    with pytest.raises(InvalidRequest) as raised:
        engine.add_prompt("r", token_ids, greedy(1))
    assert raised.value.param == "prompt"
    engine.check_idle()


@pytest.mark.parametrize("choices", [[], [0, 0], [-1], range(65), range(10**12)])
def test_choices_are_up_to_64_different_numbers(choices: list[int]) -> None:
    engine = poisoned_engine()
    with pytest.raises(InvalidRequest) as raised:
        engine.add_prompt("r", PROMPT, greedy(1), choices=choices)
    assert raised.value.param == "n"


def test_parameters_that_leave_no_token_are_refused_when_they_are_made() -> None:
    with pytest.raises(InvalidRequest, match="allowed_token_ids"):
        SamplingParams(allowed_token_ids=(5, 6), banned_token_ids=(6, 5))


def test_a_step_that_cannot_be_built_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = poisoned_engine()
    (expected,) = poisoned_engine().generate([PROMPT], greedy(5, presence_penalty=1.0))
    engine.add_prompt("r", PROMPT, greedy(5, presence_penalty=1.0))

    def fail(*arguments: object, **fields: object) -> None:
        raise MemoryError

    for owner, name, error in (
        (engine._slots, "take", StepNotBuilt),
        (engine.runner.sampler, "add", MemoryError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(error):
                engine.step()
    tokens = [token for output in run(engine) for token in output.token_ids]
    assert tuple(tokens) == expected.token_ids


class KnownDrafts(HostProposer):
    """Drafts the true continuation, four tokens at a time."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def propose(self, sequences: object) -> None:
        for sequence in sequences:  # type: ignore[attr-defined]
            known = len(sequence.token_ids)
            sequence.draft_token_ids = self._tokens[known : known + 4]


@pytest.mark.parametrize("max_tokens", [4, 5, 8])
def test_a_fault_behind_accepted_drafts_takes_no_token_with_it(max_tokens: int) -> None:
    (whole,) = poisoned_engine().generate([PROMPT], greedy(8))
    results = []
    for proposer in (None, KnownDrafts([*PROMPT, *whole.token_ids])):
        engine = poisoned_engine()
        engine.proposer = proposer

        def damage(rows: Rows, hidden: Tensor) -> None:
            with torch.inference_mode():
                hidden[rows.positions == len(PROMPT) + 4] = float("nan")

        engine.add_prompt("r", PROMPT, greedy(max_tokens))
        with watched_hidden_states(engine, damage):
            outputs = run(engine)
        tokens = [token for output in outputs for token in output.token_ids]
        results.append((tokens, outputs[-1].finish_reason, str(outputs[-1].error)))
    assert results[0] == results[1]
    assert results[0][0] == list(whole.token_ids[: min(max_tokens, 5)])


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("at", [5, 40, 62])  # the first chunk, the second, the last row
def test_what_is_not_finite_fails_its_request_and_is_in_no_cache(at: int, choices: int) -> None:
    """Of one embedding, once: as if a kernel or the memory had failed in that step."""
    engine = poisoned_engine(max_num_batched_tokens=32)
    (expected,) = poisoned_engine().generate([LONG], greedy(5))
    prompt = [*LONG[:at], 499, *LONG[at + 1 :]]
    (right,) = poisoned_engine().generate([prompt], greedy(5))
    embedding = engine.runner.model._embedding
    engine.runner.model._embedding = embedding.clone()
    engine.runner.model._embedding[499] = float("inf")
    engine.add_prompt("bad", prompt, greedy(5), choices=range(choices))
    engine.add_prompt("good", LONG, greedy(5))
    outputs = run(engine)
    failed = [output for output in outputs if output.error is not None]
    assert [(o.request_id, o.choice, o.finish_reason) for o in failed] == [
        ("bad", choice, FinishReason.ERROR) for choice in range(choices)
    ]
    tokens = [t for output in outputs if output.request_id == "good" for t in output.token_ids]
    assert tuple(tokens) == expected.token_ids
    engine.runner.model._embedding = embedding
    (again,) = engine.generate([prompt], greedy(5))
    assert again.token_ids == right.token_ids


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("fills", ["prompt", "generated"])
def test_an_infinite_key_that_nobody_has_looked_at_is_in_no_cache(fills: str, choices: int) -> None:
    """Its step gives it no weight, so that no row shows it; whoever reads the block next would."""
    engine = poisoned_engine()
    size = engine.layout.block_size
    prompt = LONG[: 3 * size - (2 if fills == "generated" else 0)]
    (expected,) = engine.generate([LONG], greedy(5))
    forward, damaged = engine.runner.model.forward, []

    def forward_and_damage(rows: Rows, cache: KVCache) -> Tensor:
        hidden = forward(rows, cache)
        for sequence in engine.scheduler.running:
            planned = engine._steps[0] if engine._steps else None
            if sequence.request_id == "bad" and planned is not None and not damaged:
                for block in filled_blocks(planned.input, size).get(sequence.sequence_id, []):
                    damaged.append(block)
                    cache.own_parts[-1][block, -1] = float("inf")
        return hidden

    engine.runner.model.forward = forward_and_damage  # type: ignore[method-assign]
    engine.add_prompt("bad", prompt, greedy(8), choices=range(choices), cache_salt="its own")
    outputs = run(engine)
    assert damaged
    assert FinishReason.ERROR in {output.finish_reason for output in outputs}
    assert engine.pool.lookup(engine.pool.snapshot().block_hashes)
    assert not set(damaged) & set(engine.pool.lookup(engine.pool.snapshot().block_hashes))
    (again,) = engine.generate([LONG], greedy(5))
    assert again.token_ids == expected.token_ids
    engine.check_idle()


def test_a_block_that_spoils_who_reads_it_leaves_the_cache_with_them() -> None:
    """However that came about: the next request computes it."""
    engine = poisoned_engine()
    (expected,) = engine.generate([LONG], greedy(5))
    engine.runner.cache.poison(engine.pool.lookup(engine.pool.snapshot().block_hashes))
    with pytest.raises(NotFiniteLogits):
        engine.generate([LONG], greedy(5))
    (again,) = engine.generate([LONG], greedy(5))
    assert again.token_ids == expected.token_ids
    engine.check_idle()


def test_an_aborted_request_hears_nothing_of_its_fault() -> None:
    engine = poisoned_engine()

    def damage(rows: Rows, hidden: Tensor) -> None:
        with torch.inference_mode():
            hidden[:] = float("nan")

    engine.add_prompt("r", PROMPT, greedy(5))
    with watched_hidden_states(engine, damage):
        planned = engine.plan()
        assert planned is not None
        computed = engine.runner.run(planned.input)
        engine.abort("r")
        assert engine.commit(planned, computed) == []
    engine.check_idle()


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("moment", ["planned", "computed"])
@pytest.mark.parametrize("choices", [1, 3])
def test_an_abort_inside_a_step_frees_everything(choices: int, moment: str, crash: bool) -> None:
    params = SamplingParams(
        max_tokens=12, seed=7, ignore_eos=True, presence_penalty=1.0, prompt_logprobs=1, logprobs=1
    )
    for steps in range(7):
        engine = poisoned_engine(max_num_batched_tokens=32)
        engine.add_prompt("r", LONG, params, choices=range(choices))
        engine.add_prompt("other", PROMPT, greedy(6))
        for _ in range(steps):
            engine.step()
        planned = engine.plan()
        assert planned is not None
        if moment == "planned":
            engine.abort("r")
        if crash:
            engine.fail(planned)
            engine.abort("r")
        else:
            computed = engine.runner.run(planned.input)
            engine.abort("r")
            assert all(o.request_id == "other" for o in engine.commit(planned, computed))
        assert all(output.request_id == "other" for output in run(engine))


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    engine = poisoned_engine(num_kv_blocks=16, max_num_batched_tokens=48)
    prompts = [list(range(5, 165)), list(range(6, 165)), list(range(5, 14))]
    for index, prompt in enumerate(prompts):
        engine.add_prompt(str(index), prompt, greedy(60, prompt_logprobs=1))
    outputs = run(engine)
    assert engine.scheduler.num_preemptions > 0
    with_scores = [o for o in outputs if o.prompt_logprobs is not None]
    assert [(o.request_id, o.position) for o in with_scores] == [
        (str(index), len(prompt)) for index, prompt in enumerate(prompts)
    ]
    single = poisoned_engine(max_num_seqs=1)  # choices run one after the other
    single.add_prompt("r", LONG, greedy(4, prompt_logprobs=1), choices=range(3))
    assert [o.choice for o in run(single) if o.prompt_logprobs is not None] == [0]
    single.add_prompt("r", [*LONG, 5], greedy(4, prompt_logprobs=1), prompt_len=len(LONG))
    assert [o for o in run(single) if o.prompt_logprobs is not None] == []


def test_a_vocabulary_smaller_than_the_logprobs_wanted(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path,
        "llama",
        3,
        vocab_size=7,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    engine = Engine.load(folder, dtype="float32", num_kv_blocks=8)
    (completion,) = engine.generate([[1, 2]], greedy(2, logprobs=20, prompt_logprobs=20))
    assert completion.prompt_logprobs is not None
    for entry in (*completion.logprobs, completion.prompt_logprobs[1]):
        assert entry is not None
        assert sorted(token for token, _ in entry.top) == list(range(7))


@pytest.mark.parametrize(
    "settings", [{"max_model_len": 2}, {"num_kv_blocks": 1}, {"num_kv_blocks": 1, "block_size": 1}]
)
def test_the_smallest_engines_warm_up(settings: dict[str, int]) -> None:
    engine = poisoned_engine(**settings)
    engine.warm_up()
    engine.check_idle()


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int8"},
        {"device": "tpu"},
        {"kernels": "fast"},
        {"load_format": "gguf"},
        {"block_size": 0},
        {"block_size": "16"},
        {"num_kv_blocks": -3},
        {"threads": 0},
        {"threads": 10_000},
        {"max_model_len": 1},
        {"max_num_seqs": True},
        {"max_num_batched_tokens": 2, "max_num_seqs": 4},
    ],
)
def test_a_setting_of_another_type_or_range_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        Engine.load(STORIES, **{"num_kv_blocks": 8} | settings)
    assert raised.value.param == next(iter(settings))


def test_float16_and_an_absent_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="float16 does not run on CPU"):
        Engine.load(STORIES, device="cpu", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            Engine.load(STORIES, device="cuda")


def test_each_engine_computes_with_its_own_threads() -> None:
    """Thread counts belong to a thread, and another engine in it may have changed them."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core only")
    seen: list[tuple[int, int]] = []

    def watch(rows: Rows, hidden: Tensor) -> None:
        seen.append((numba.get_num_threads(), torch.get_num_threads()))

    two, one = poisoned_engine(threads=2), poisoned_engine(threads=1)
    for engine, threads in ((two, 2), (one, 1), (two, 2)):
        with watched_hidden_states(engine, watch):
            engine.generate([PROMPT], greedy(2))
        assert set(seen) == {(threads, threads)}
        seen.clear()
    one.runner.backend.enter_thread()


def test_errors_have_a_code_and_a_place_in_the_tree() -> None:
    engine = poisoned_engine()
    engine.add_prompt("r", PROMPT, SamplingParams(min_tokens=2, allowed_token_ids=(2,)))
    (output,) = run(engine)
    assert output.finish_reason is FinishReason.ERROR
    assert isinstance(output.error, PdqError)
    assert output.error.code == "no_token"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with …"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_a_device_is_lost_by_errors_that_every_later_call_repeats(error: Exception, lost: bool) -> None:
    assert CudaDevice(EngineSettings()).is_lost(error) == lost
