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

from common.engine import Engine, SamplingParams
from common.engine.devices.cpu.backend import CpuBackend
from common.engine.devices.cpu.products import OneDnnProducts, OwnProducts
from common.settings.config import EngineSettings
from tests.support.checkpoints import save_random_model
from tests.support.engines import with_poison
from tests.support.logit_record import RandomProposer, Run, run_recorded

VOCAB = 512
LONGEST = 2048


@dataclasses.dataclass(frozen=True)
class Regime:
    """One way of batching; `num_kv_blocks` of 16 positions."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_blocks: int
    prefix_caching: bool
    drafts: bool
    longest: bool = True  # whether the prompt to the end of the context takes part
    families: int = 4  # of three requests with a common stem, that take part


ALONE = Regime(1, LONGEST, 300, prefix_caching=False, drafts=False)
REGIMES = [
    Regime(16, 512, 1200, prefix_caching=True, drafts=False),
    Regime(16, 77, 70, prefix_caching=True, drafts=True, longest=False),
    Regime(7, 33, LONGEST // 16 + 6, prefix_caching=False, drafts=True),
    Regime(3, 1000, 300, prefix_caching=True, drafts=False),
    Regime(16, 200, 60, prefix_caching=False, drafts=False, longest=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that oneDNN would choose other kernels for other batches (K above 1,024)."""
    return save_random_model(
        tmp_path_factory.mktemp("model"),
        "qwen3",
        11,
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=1088,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONGEST,
        use_sliding_window=True,
        sliding_window=100,
        max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


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
            max_tokens=96 if name == "longest" else int(random.integers(30, 130)),
            temperature=1.0,
            seed=int(random.integers(1 << 60)),
            ignore_eos=True,
        )
        for name in prompts
    }
    return prompts, params


def run(folder: Path, regime: Regime, dtype: str, threads: int, seed: int, truth: Run | None) -> Run:
    engine = with_poison(
        EngineSettings(
            model=str(folder),
            dtype=dtype,
            threads=threads,
            max_num_seqs=regime.max_num_seqs,
            max_num_batched_tokens=regime.max_num_batched_tokens,
            num_kv_blocks=regime.num_kv_blocks,
            enable_prefix_caching=regime.prefix_caching,
        )
    )
    if regime.drafts and truth:
        engine.proposer = RandomProposer(truth.tokens, VOCAB, seed)
    prompts, params = requests(seed)
    out = [] if regime.longest else ["longest"]
    out += [name for name in prompts if name.startswith("family-") and int(name[7]) >= regime.families]
    order = [name for name in prompts if name not in out]
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
    alone, regimes = ALONE, REGIMES
    if threads == 2:  # which wait for each other on a busy machine
        alone, *regimes = (dataclasses.replace(r, longest=False, families=1) for r in (ALONE, REGIMES[1]))
    truth = run(folder, alone, dtype, threads, 0, None)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_logit_depends_on_the_block_size_or_the_context(folder: Path, dtype: str) -> None:
    """Such settings change hashes, or how much fits, and no bit."""
    prompt = np.random.default_rng(4).integers(0, VOCAB, 333).tolist()
    params = SamplingParams(max_tokens=40, seed=5, ignore_eos=True)
    runs = []
    for settings in (
        {},
        {"block_size": 1, "num_kv_blocks": 400},
        {"block_size": 7},
        {"block_size": 128},
        {"max_model_len": 400},
        {"max_num_batched_tokens": 9},
    ):
        fields = {"num_kv_blocks": 100, "max_num_seqs": 4, "threads": 1} | settings
        engine = Engine.load(folder, dtype=dtype, **fields)
        recorded = run_recorded(engine, {"r": prompt}, {"r": params}, ["r"])
        runs.append((recorded.tokens, {key: rows[0] for key, rows in recorded.logits.items()}))
    for tokens, logits in runs[1:]:
        assert tokens == runs[0][0]
        assert all(torch.equal(row, runs[0][1][key]) for key, row in logits.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("products", [OwnProducts, OneDnnProducts])
def test_settle_sees_every_count_of_rows_that_gives_other_bits(
    dtype: torch.dtype, threads: int, products: type[OwnProducts] | type[OneDnnProducts]
) -> None:
    """With biases, heads on embeddings, and sizes that fit no vector."""
    generator = torch.Generator().manual_seed(2)
    for inputs, outputs in ((64, 192), (101, 300), (1089, 513), (4865, 97), (17, 2048), (1, 9)):
        for kind in ("plain", "biased", "tied"):
            backend = CpuBackend(dtype, threads, products(dtype))
            weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
            bias = torch.randn(outputs, generator=generator).to(dtype) if kind == "biased" else None
            tied = kind == "tied"
            linear = backend.tied_linear(weight) if tied else backend.linear(weight, bias)
            backend.settle()
            x = torch.randn(32, inputs, generator=generator).to(dtype)
            whole = linear(x, 32)
            for count in range(0, 32, backend.row_plan.generated_multiple):
                assert torch.equal(linear(x[count:], 32 - count), whole[count:])
    CpuBackend(dtype, 1)  # this thread computes with one again


def test_the_class_names_what_the_bits_depend_on(folder: Path) -> None:
    def fingerprint(dtype: str, threads: int, block_size: int = 16) -> str:
        engine = Engine.load(folder, dtype=dtype, threads=threads, num_kv_blocks=8, block_size=block_size)
        return engine.fingerprint.numerics

    assert fingerprint("bfloat16", 1) != fingerprint("float32", 1)
    assert fingerprint("bfloat16", 1) != fingerprint("bfloat16", 2)
    assert fingerprint("bfloat16", 1) == fingerprint("bfloat16", 1)
    assert fingerprint("bfloat16", 1) == fingerprint("bfloat16", 1, block_size=48)
