"""One request has one reply: the same tokens and the same bits of their log probabilities, however it is
batched, cut, cached, preempted or drafted. And a decode step waits for nothing but its own end.

Self-contained: torch, triton, transformers. Run on a GPU by `make test-gpu`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common.engine import Completion, Engine, SamplingParams
from common.engine.core.sequence import Sequence
from common.engine.speculation import HostProposer
from common.settings.config import EngineSettings
from tests.support.checkpoints import save_random_model, transformers_model
from tests.support.engines import with_poison

pytestmark = pytest.mark.gpu

VOCAB = 4096
CONTEXT = 2048
ALTERNATIVES = 8  # log probabilities of so many tokens at each position


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """Layers with and without a window; sizes that are no multiples of any tile."""
    wide = {
        "hidden_size": 704,
        "intermediate_size": 1568,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
    }
    slim = {"hidden_size": 88, "intermediate_size": 196, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_random_model(
        tmp_path_factory.mktemp("model"),
        "qwen3",
        11,
        vocab_size=VOCAB,
        num_hidden_layers=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        use_sliding_window=True,
        sliding_window=300,
        max_window_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **(slim if device == "cpu" else wide),
    )


@dataclasses.dataclass(frozen=True)
class Probe:
    """A request whose reply is compared."""

    prompt: tuple[int, ...]
    params: SamplingParams


def probes() -> list[Probe]:
    """Short and long prompts, one beyond the window and several splits of attention; every way to sample."""
    random = np.random.default_rng(3)
    ways = (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 6, "presence_penalty": 0.4},
        {"temperature": 1.2, "min_p": 0.02, "seed": 7, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    )
    return [
        Probe(
            tuple(random.integers(0, VOCAB, length).tolist()),
            SamplingParams(max_tokens=40, logprobs=ALTERNATIVES, ignore_eos=True, **way),  # type: ignore[arg-type]
        )
        for length, way in zip((1, 37, 290, 1100), ways, strict=True)
    ]


def engine(folder: Path, device: str, **fields: object) -> Engine:
    settings: dict[str, object] = {
        "model": str(folder),
        "device": device,
        "dtype": "bfloat16",
        "num_kv_blocks": 2048,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    }
    made = with_poison(EngineSettings(**(settings | fields)))  # type: ignore[arg-type]
    made.steps_ahead = 0 if made.facts.on_host else 1
    return made


class KnownReplies(HostProposer):
    """Drafts the replies that are known by their prompts, some of them wrong."""

    def __init__(self, known: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self._known = known
        self._random = np.random.default_rng(1)
        self.num_drafted = 0

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        for sequence in sequences:
            reply = self._known.get(tuple(sequence.token_ids[: sequence.prompt_len]), ())
            done = len(sequence.token_ids) - sequence.prompt_len
            drafts = list(reply[done : done + int(self._random.integers(7))])
            if drafts and self._random.integers(2):
                drafts[int(self._random.integers(len(drafts)))] = int(self._random.integers(VOCAB))
            sequence.draft_token_ids = drafts
            self.num_drafted += len(drafts)


Reply = tuple[tuple[int, ...], bytes]


def replies(engine: Engine, asked: list[Probe], others: int = 0) -> list[Reply]:
    """Tokens, and every log probability as bytes, while `others` sequences decode beside them."""
    random = np.random.default_rng(others)
    beside = [
        (
            random.integers(0, VOCAB, int(random.integers(1, 80))).tolist(),
            SamplingParams(max_tokens=60, seed=index, ignore_eos=True),
        )
        for index in range(others)
    ]
    prompts = [list(probe.prompt) for probe in asked] + [prompt for prompt, _ in beside]
    params = [probe.params for probe in asked] + [params for _, params in beside]
    completions = engine.generate(prompts, params)
    engine.check_idle()
    return [(tuple(c.token_ids), logprob_bytes(c)) for c in completions[: len(asked)]]


def logprob_bytes(completion: Completion) -> bytes:
    values = [
        value
        for entry in completion.logprobs
        for value in (
            entry.logprob,
            *(logprob for _, logprob in entry.top),
            *(float(token) for token, _ in entry.top),
        )
    ]
    return struct.pack(f"<{len(values)}f", *values)


@pytest.fixture(scope="module")
def alone(folder: Path, device: str) -> list[Reply]:
    """Each probe by itself, in whole prompts, nothing cached."""
    one = engine(folder, device, enable_prefix_caching=False)
    return [reply for probe in probes() for reply in replies(one, [probe])]


def test_the_class_promises_what_is_tested_here(
    folder: Path, device: str, alone: list[Reply], record_property: pytest.RecordProperty
) -> None:
    """The digest is what two cards are compared by."""
    made = engine(folder, device)
    assert "reference" not in made.fingerprint.numerics
    assert "unrepeatable" not in made.fingerprint.numerics
    record_property("numerics_class", made.fingerprint.numerics)
    digest = hashlib.blake2b(b"".join(logprobs for _, logprobs in alone), digest_size=16).hexdigest()
    record_property("digest", digest)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_log_probabilities_are_those_of_transformers(
    folder: Path, device: str, dtype: str, within: float
) -> None:
    """In float32 on the host: of prompts beyond the window, and of what follows them."""
    one = engine(folder, device, dtype=dtype)
    greedy = SamplingParams(max_tokens=24, temperature=0.0, logprobs=ALTERNATIVES, ignore_eos=True)
    prompts = [list(probe.prompt) for probe in probes()]
    completions = one.generate(prompts, greedy)
    model = transformers_model(folder)
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + list(completion.token_ids)])).logits[
                0, len(prompt) - 1 : -1
            ]
        theirs = torch.log_softmax(logits, -1)
        for position, entry in enumerate(completion.logprobs):
            for token, logprob in entry.top:
                assert logprob == pytest.approx(float(theirs[position, token]), abs=within)
            best = float(theirs[position].max())
            assert float(theirs[position, completion.token_ids[position]]) >= best - 2 * within


@pytest.mark.parametrize("others", [1, 3, 7, 15, 23, 40, 61, 100, 180, 252])
def test_no_bit_depends_on_who_decodes_beside(
    folder: Path, device: str, alone: list[Reply], others: int
) -> None:
    assert replies(engine(folder, device), probes(), others) == alone


@pytest.mark.parametrize("tokens", [16, 33, 100, 257, 1000])
def test_no_bit_depends_on_how_prompts_are_cut(
    folder: Path, device: str, alone: list[Reply], tokens: int
) -> None:
    assert (
        replies(engine(folder, device, max_num_batched_tokens=tokens, max_num_seqs=8), probes(), 6) == alone
    )


def test_no_bit_depends_on_what_is_cached(folder: Path, device: str, alone: list[Reply]) -> None:
    one = engine(folder, device)
    assert replies(one, probes()) == alone
    assert replies(one, probes(), 5) == alone
    assert one.pool.num_hit_blocks > 0


def test_no_bit_depends_on_preemption(folder: Path, device: str, alone: list[Reply]) -> None:
    one = engine(folder, device, num_kv_blocks=CONTEXT // 16 + 8, max_num_seqs=16, max_num_batched_tokens=300)
    assert replies(one, probes(), 20) == alone
    assert one.scheduler.num_preemptions > 0


@pytest.mark.parametrize("others", [0, 12])
def test_no_bit_depends_on_drafts(folder: Path, device: str, alone: list[Reply], others: int) -> None:
    """Right and wrong ones, of 0 to 6 tokens."""
    one = engine(folder, device, max_num_seqs=16)
    one.proposer = KnownReplies(
        {probe.prompt: tokens for probe, (tokens, _) in zip(probes(), alone, strict=True)}
    )
    assert replies(one, probes(), others) == alone
    assert one.proposer.num_drafted > 0


def test_no_bit_depends_on_graphs_or_on_planning_ahead(folder: Path, device: str, alone: list[Reply]) -> None:
    eager = engine(folder, device, enforce_eager=True)
    eager.steps_ahead = 0
    assert replies(eager, probes(), 9) == alone


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types_keep_the_rule(folder: Path, device: str, dtype: str) -> None:
    if device == "cpu" and dtype == "float16":
        pytest.skip("a host does not compute in float16")
    one = engine(folder, device, dtype=dtype, enable_prefix_caching=False)
    separately = [reply for probe in probes() for reply in replies(one, [probe])]
    assert replies(engine(folder, device, dtype=dtype), probes(), 30) == separately


@contextmanager
def no_hidden_waits(device: str) -> Iterator[None]:
    """An error of torch where the host waits for the device by the way."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_decode_step_waits_for_its_own_end_alone(folder: Path, device: str) -> None:
    """Nothing in a step of decoding, greedy or sampled with everything, waits in a way that torch sees."""
    one = engine(folder, device, max_num_seqs=16)
    for index, probe in enumerate(probes() * 3):
        one.add_prompt(f"probe-{index}", list(probe.prompt), probe.params)
    started: set[str] = set()
    while len(started) < 12:
        started |= {output.request_id for output in one.step()}
    with no_hidden_waits(device):
        for _ in range(16):
            assert one.step()
    while one.has_work:
        one.step()
    one.check_idle()
