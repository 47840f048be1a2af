"""The numerics rule: no bit of any logit depends on how the work was batched.

The same requests run alone, then in random batches with random chunk sizes, pools so small that
sequences are preempted and recomputed, shared prefixes served from the cache, and random drafts,
right and wrong. Every logits row of every position must be equal, bit for bit; freed blocks are
filled with NaN, and tokens are sampled at temperature 1, so that a difference would spread.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import EngineSettings
from common.engine import Engine, SamplingParams
from tests.support.checkpoints import save_random_model
from tests.support.logit_record import RandomProposer, Run, run_recorded

VOCAB = 512
LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class Regime:
    """One way of batching; `num_kv_blocks` of 16 positions."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_blocks: int
    prefix_caching: bool
    drafts: bool
    longest: bool = True  # whether the prompt to the end of the context takes part


ALONE = Regime(1, 4096, 300, prefix_caching=False, drafts=False)
REGIMES = [
    Regime(16, 512, 1200, prefix_caching=True, drafts=False),
    Regime(16, 77, 70, prefix_caching=True, drafts=True, longest=False),
    Regime(7, 33, 262, prefix_caching=False, drafts=True),
    Regime(3, 1000, 300, prefix_caching=True, drafts=False),
    Regime(16, 200, 60, prefix_caching=False, drafts=False, longest=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that oneDNN would choose other kernels for other batches (K above 1,024)."""
    return save_random_model(
        tmp_path_factory.mktemp("model"), "qwen3", 11, vocab_size=VOCAB, hidden_size=192,
        intermediate_size=1088, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=LONGEST,
        use_sliding_window=True, sliding_window=100, max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip


def requests(seed: int) -> tuple[dict[str, list[int]], dict[str, SamplingParams]]:
    """A prompt to the end of the context, many short ones, and families that share prefixes."""
    random = np.random.default_rng(seed)
    prompts: dict[str, list[int]] = {"longest": random.integers(0, VOCAB, LONGEST - 96).tolist()}
    for family in range(4):
        stem = random.integers(0, VOCAB, int(random.integers(20, 600))).tolist()
        for member in range(3):
            tail = random.integers(0, VOCAB, int(random.integers(1, 60))).tolist()
            prompts[f"family-{family}-{member}"] = stem + tail
    for index in range(4):
        prompts[f"short-{index}"] = random.integers(0, VOCAB, 1 + 5 * index).tolist()
    params = {
        name: SamplingParams(
            max_tokens=96 if name == "longest" else int(random.integers(60, 250)),
            temperature=1.0, seed=int(random.integers(1 << 60)), ignore_eos=True,
        )
        for name in prompts
    }  # fmt: skip
    return prompts, params


def run(
    folder: Path, regime: Regime, dtype: str, threads: int, seed: int, truth: Run | None
) -> Run:
    engine = Engine(
        EngineSettings(
            model=str(folder), dtype=dtype, threads=threads, max_num_seqs=regime.max_num_seqs,
            max_num_batched_tokens=regime.max_num_batched_tokens,
            num_kv_blocks=regime.num_kv_blocks, enable_prefix_caching=regime.prefix_caching,
        ),
        proposer=RandomProposer(truth.tokens, VOCAB, seed) if regime.drafts and truth else None,
        poison_freed_blocks=True,
    )  # fmt: skip
    prompts, params = requests(seed)
    order = [name for name in prompts if regime.longest or name != "longest"]
    np.random.default_rng(seed + regime.max_num_seqs).shuffle(order)
    return run_recorded(engine, prompts, params, order)


def count_differing(truth: Run, other: Run) -> tuple[int, int]:
    """(logits compared, logits whose bits differ)."""
    compared = differing = 0
    for key, rows in other.logits.items():
        (expected,) = truth.logits[key]
        for row in rows:
            compared += row.numel()
            differing += int((row.view(torch.uint8) != expected.view(torch.uint8)).sum())
    return compared, differing


@pytest.mark.parametrize(("dtype", "threads"), [("bfloat16", 1), ("float32", 1), ("bfloat16", 2)])
def test_no_logit_depends_on_the_batch(folder: Path, dtype: str, threads: int) -> None:
    regimes = REGIMES if threads == 1 else REGIMES[:2]
    truth = run(folder, ALONE, dtype, threads, 0, None)
    total, preemptions = 0, 0
    for regime in regimes:
        other = run(folder, regime, dtype, threads, 0, truth)
        assert other.tokens == {name: truth.tokens[name] for name in other.tokens}, regime
        compared, differing = count_differing(truth, other)
        assert differing == 0, f"{differing} of {compared} logits differ in {regime}"
        total += compared
        preemptions += other.num_preemptions
    print(f"{dtype}, {threads} threads: {total} logits compared, {preemptions} preemptions")
    if threads == 1:
        assert total >= 10**7
        assert preemptions >= 10


def test_the_class_names_what_the_bits_depend_on(folder: Path) -> None:
    def fingerprint(dtype: str, threads: int) -> str:
        engine = Engine.load(folder, dtype=dtype, threads=threads, num_kv_blocks=8)
        return engine.fingerprint.numerics

    assert fingerprint("bfloat16", 1) != fingerprint("float32", 1)
    assert fingerprint("bfloat16", 1) != fingerprint("bfloat16", 2)
    assert fingerprint("bfloat16", 1) == fingerprint("bfloat16", 1)
