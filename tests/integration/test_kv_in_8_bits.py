"""Keys and values in 8 bits (`kv_cache_dtype`): what an engine computes of them, and that it is one thing
however it came about.

Between nodes: test_moved_sequences.py, and tests/e2e/test_kv_of_8_bits_between_nodes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.engine import Engine, FinishReason, SamplingParams
from common.engine.devices.cpu.backend import CpuBackend
from common.engine.devices.kv_cache import KVCache
from common.engine.devices.rows import Rows
from common.engine.devices.scaled_rows import scaled, unscaled
from common.engine.runner.soundness import filled_blocks
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.model import ModelSource
from common.errors import ConfigError, NotFiniteLogits
from common.kv_layout import Mismatch, root_hash
from tests.support.checkpoints import DRAFT
from tests.support.engines import FreeRounds, NoCosts, poisoned_engine, prompt_logits
from tests.support.hashes import chain_hashes

PROMPT = list(range(5, 165))
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=0.9, seed=7, ignore_eos=True)
every_kernel = pytest.mark.parametrize("kernels", ["auto", "reference"])


def engine_of(kv_cache_dtype: str = "fp8", **settings: Any) -> Engine:
    fields = {"device": "cpu"} | settings
    return poisoned_engine(fields.pop("host_proposer", None), kv_cache_dtype=kv_cache_dtype, **fields)


def stored(engine: Engine, layer: int, kind: str, token_ids: list[int]) -> Tensor:
    """Of a prompt that is cached, what is read back of its full blocks: float32 `[positions, heads, dim]`."""
    chain = chain_hashes(root_hash(engine.fingerprint), token_ids, engine.layout.block_size, len(token_ids))
    blocks, cache = engine.pool.lookup(chain), engine.runner.cache
    assert len(blocks) == len(chain)
    rows, scales = cache.view(layer, kind)[blocks], cache.scales(layer, kind)
    return (rows.float() if scales is None else unscaled(rows, scales[blocks])).flatten(0, 1)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")]
)
def test_the_setting_is_in_layout_and_numerics_class_and_keeps_nodes_apart(name: str, dtype: str) -> None:
    mine, plain = engine_of(name), engine_of("auto")
    assert f"k {dtype} heads" in mine.fingerprint.layout
    assert "k_scale bfloat16 heads" in mine.fingerprint.layout
    assert mine.fingerprint.numerics == f"{plain.fingerprint.numerics}/kv-{dtype}-1"
    assert mine.fingerprint.mismatch(plain.fingerprint) == Mismatch("dtype", dtype, "float32")
    assert root_hash(mine.fingerprint) != root_hash(plain.fingerprint)


def test_a_device_whose_kernels_cannot_says_so_by_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "kv_dtypes", ("float8_e5m2",))
    engine_of("fp8_e5m2")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype fp8: the kernels in use \(cpu\)") as caught:
        engine_of("fp8")
    assert caught.value.param == "kv_cache_dtype"


def test_the_same_memory_holds_more_than_twice_the_blocks_less_the_scales() -> None:
    fields = {"num_kv_blocks": None, "kv_cache_memory_bytes": 8 << 20, "dtype": "bfloat16"}
    plain, narrow = engine_of("auto", **fields), engine_of("fp8", **fields)
    head_dim, scale_bytes = narrow.runner.config.head_dim, 2
    expected = plain.facts.num_blocks * 2 * head_dim / (head_dim + scale_bytes)
    assert narrow.facts.num_blocks == pytest.approx(expected, abs=2)


@every_kernel
@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_stored_of_the_first_layer_is_off_by_what_the_format_rounds(
    kernels: str, name: str, dtype: str
) -> None:
    """Its keys and values come from the tokens alone, so that both engines have the same. At most half a unit
    in the last place: 2**-4 of an element in E4M3, 2**-3 in E5M2 (4 and 3 significant bits, OFP8), or half
    the least subnormal, 2**-10 or 2**-17, times a scale, which is below 2/1.75/2**8 (2**15) of the largest.
    """
    precision, least, top = {"fp8": (2.0**-4, 2.0**-10, 8), "fp8_e5m2": (2.0**-3, 2.0**-17, 15)}[name]
    exact, narrow = (engine_of(n, kernels=kernels, dtype=dtype) for n in ("auto", name))
    for engine in (exact, narrow):
        engine.generate([PROMPT], GREEDY)
    for kind in ("k", "v"):
        wanted, found = (stored(engine, 0, kind, PROMPT) for engine in (exact, narrow))
        scale = wanted.abs().amax(-1, keepdim=True) * 2 / 1.75 * 2.0**-top
        assert ((found - wanted).abs() <= torch.maximum(wanted.abs() * precision, scale * least)).all()
        assert not torch.equal(found, wanted)
        elements = scaled(wanted, narrow.runner.cache.view(0, kind).dtype)
        assert torch.equal(unscaled(*elements), found)


def test_both_kernels_compute_about_the_same_of_what_is_stored() -> None:
    ours, plain = (engine_of(kernels=kernels) for kernels in ("auto", "reference"))
    one, other = (prompt_logits(engine, PROMPT).log_softmax(-1) for engine in (ours, plain))
    off = (prompt_logits(engine_of("auto"), PROMPT).log_softmax(-1) - one).abs()
    assert (one - other).abs().mean() < 0.05 * off.mean() > 0


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_chunks_batches_preemption_and_the_cache_leave_no_trace(params: SamplingParams) -> None:
    prompts = [PROMPT, PROMPT[1:], PROMPT[:9], PROMPT[:64]]
    expected = [engine_of().generate([prompt], params)[0].token_ids for prompt in prompts]
    small = engine_of(num_kv_blocks=16, max_num_batched_tokens=48, max_num_seqs=4)
    for _ in range(2):
        together = small.generate(prompts, params)
        assert [completion.token_ids for completion in together] == expected
    small.check_idle()
    roomy = engine_of()
    for _ in range(2):  # the second time from the cache, the last one to its end
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert roomy.generate([prompt], params)[0].token_ids == tokens
    assert roomy.pool.num_hit_blocks
    roomy.check_idle()


def test_prompt_logprobs_survive_chunks_and_preemption() -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    (whole,) = engine_of().generate([PROMPT], params)
    engine = engine_of(num_kv_blocks=16, max_num_batched_tokens=48)
    several = engine.generate([PROMPT, PROMPT[1:], PROMPT[:9]], params)
    assert several[0].prompt_logprobs == whole.prompt_logprobs
    engine.check_idle()


def test_a_reply_has_the_bytes_of_a_prompt_scales_included() -> None:
    """Nothing that was stored one token at a time differs from what was stored at once."""
    engine = engine_of()
    (reply,) = engine.generate([PROMPT], SEEDED)
    turn = [*PROMPT, *reply.token_ids][: 11 * engine.layout.block_size]
    fresh = engine_of()
    fresh.generate([turn], SEEDED)
    chains = [chain_hashes(root_hash(one.fingerprint), turn, 16, len(turn)) for one in (engine, fresh)]
    ours, theirs = (one.pool.lookup(chain) for one, chain in zip((engine, fresh), chains, strict=True))
    assert len(ours) == len(theirs) == 11
    assert torch.equal(engine.runner.cache.slabs[ours], fresh.runner.cache.slabs[theirs])


@pytest.mark.parametrize("by_text", [False, True])
def test_drafts_of_a_model_whose_kv_has_8_bits_too_change_nothing(by_text: bool) -> None:
    fields: dict[str, Any] = {"speculative": "draft", "speculative_model": str(DRAFT)}
    if by_text:
        fields["speculative_by_text"] = True
    proposer = Drafting([ModelSource(512)], 4, NoCosts(), FreeRounds(0.0))
    drafting = engine_of(host_proposer=proposer, **fields)
    assert ("k float8_e4m3fn" in drafting.layout.describe_draft()) == (not by_text)
    for params in (GREEDY, SEEDED):
        (expected,) = engine_of().generate([PROMPT[:40]], params)
        (found,) = drafting.generate([PROMPT[:40]], params)
        assert found.token_ids == expected.token_ids
    assert proposer.counts["draft"].accepted > 0
    drafting.check_idle()


@every_kernel
@pytest.mark.parametrize("what", ["k", "v", "k_scale", "v_scale"])
def test_memory_that_fails_is_found_whatever_it_held_and_leaves_the_cache(kernels: str, what: str) -> None:
    """A NaN of 8 bits, or one scale; in a block that is cached and read again."""
    engine = engine_of(kernels=kernels)
    (right,) = engine.generate([PROMPT], GREEDY)
    chain = chain_hashes(root_hash(engine.fingerprint), PROMPT, 16, len(PROMPT))
    block = engine.pool.lookup(chain)[2]
    engine.runner.cache.view(1, what)[block, 3].view(-1)[-1] = torch.nan
    with pytest.raises(NotFiniteLogits):
        engine.generate([PROMPT], GREEDY)
    (again,) = engine.generate([PROMPT], GREEDY)
    assert again.token_ids == right.token_ids
    engine.check_idle()


@pytest.mark.parametrize("what", ["k", "k_scale"])
def test_a_filled_block_with_a_key_that_nobody_has_looked_at_is_in_no_cache(what: str) -> None:
    engine = engine_of()
    forward, damaged = engine.runner.model.forward, []

    def forward_and_damage(rows: Rows, cache: KVCache) -> Tensor:
        hidden = forward(rows, cache)
        planned = engine._steps[0] if engine._steps else None
        if planned is not None and not damaged:
            for blocks in filled_blocks(planned.input, 16).values():
                damaged.extend(blocks)
                cache.view(4, what)[blocks[-1]].view(-1)[-1] = torch.nan
        return hidden

    engine.runner.model.forward = forward_and_damage  # type: ignore[method-assign]
    engine.add_prompt("bad", PROMPT[:48], GREEDY)
    reasons = {output.finish_reason for _ in range(4) if engine.has_work for output in engine.step()}
    assert damaged
    assert FinishReason.ERROR in reasons
    assert not engine.pool.snapshot().block_hashes
    engine.check_idle()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_when_it_is_stored_ends_its_request_alone(number: float) -> None:
    """Formats have no infinity, or make the largest number of it; its scale is NaN."""
    engine = engine_of()
    (right,) = engine.generate([PROMPT], GREEDY)
    embedding = engine.runner.model._embedding
    before, embedding[499] = embedding[499].clone(), number
    try:
        with pytest.raises(NotFiniteLogits):
            engine.generate([[*PROMPT[:20], 499, *PROMPT[20:]]], GREEDY)
    finally:
        embedding[499] = before
    (again,) = engine.generate([PROMPT], GREEDY)
    assert again.token_ids == right.token_ids
    engine.check_idle()
