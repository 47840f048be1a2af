"""The decoder computes what transformers computes, for every family and rope type it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.engine import Engine, SamplingParams
from common.model_files import SHIPPED_DRAFT, SHIPPED_MODEL
from tests.support.checkpoints import (
    BABYLLAMA,
    STORIES,
    save_random_model,
    transformers_model,
)
from tests.support.engines import prompt_logits

TOLERANCE = 1e-4  # of the largest logit


def assert_same_logits(folder: Path, token_ids: list[int], **engine_settings: Any) -> None:
    engine = Engine.load(folder, dtype="float32", **engine_settings)
    mine = prompt_logits(engine, token_ids)
    with torch.inference_mode():
        theirs = transformers_model(folder)(torch.tensor([token_ids])).logits[0]
    largest = float(theirs.abs().max())
    assert float((mine - theirs).abs().max()) <= TOLERANCE * largest


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@st.composite
def configurations(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4]))
    kind = draw(st.sampled_from(sorted(ROPES)))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.sampled_from([97, 256, 331])),
        "hidden_size": heads * draw(st.sampled_from([8, 16])),
        "intermediate_size": draw(st.sampled_from([40, 64, 100])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([8, 16, 32])),
        "max_position_embeddings": 256,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": draw(st.sampled_from([500.0, 10_000.0, 1e6])),
            **ROPES[kind],
        },
    }
    if model_type == "llama":
        fields["attention_bias"] = draw(st.booleans())
        fields["mlp_bias"] = draw(st.booleans())
    if model_type == "mistral":
        fields["sliding_window"] = draw(st.sampled_from([None, 1, 7, 64]))
    if model_type == "qwen2":
        fields["head_dim"] = fields["hidden_size"] // heads
        fields["use_sliding_window"] = draw(st.booleans())
        fields["sliding_window"] = 9
        fields["max_window_layers"] = 1
    if model_type == "qwen3":
        fields["attention_bias"] = draw(st.booleans())
    return fields


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_configurations_give_transformers_logits(
    model_type: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(
        max_examples=12, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fields=configurations(model_type), length=st.integers(1, 200), seed=st.integers(0, 99))
    def check(fields: dict[str, Any], length: int, seed: int) -> None:
        folder = save_random_model(tmp_path_factory.mktemp("model"), model_type, seed, **fields)
        token_ids = np.random.default_rng(seed).integers(0, fields["vocab_size"], length).tolist()
        assert_same_logits(folder, token_ids, max_num_batched_tokens=64, max_num_seqs=4)

    check()


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path, "llama", 5, vocab_size=300, hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, max_shard_size="60KB",
    )  # fmt: skip
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_logits(folder, list(range(40)))


REAL_MODELS = [STORIES, BABYLLAMA, SHIPPED_MODEL, SHIPPED_DRAFT]


@pytest.mark.parametrize("folder", REAL_MODELS, ids=lambda folder: folder.name)
def test_real_models_give_transformers_logits(folder: Path) -> None:
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    token_ids = np.random.default_rng(1).integers(0, vocab_size, 200).tolist()
    assert_same_logits(folder, token_ids)


def greedy_pair(folder: Path, token_ids: list[int], count: int) -> tuple[list[int], list[int]]:
    """`count` greedy tokens of the engine, and of transformers' generate."""
    engine = Engine.load(folder, dtype="float32", max_num_batched_tokens=64, max_num_seqs=4)
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    (mine,) = engine.generate([token_ids], params)
    with torch.inference_mode():
        theirs = transformers_model(folder).generate(
            torch.tensor([token_ids]), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return list(mine.token_ids), theirs[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("folder", REAL_MODELS, ids=lambda folder: folder.name)
def test_real_models_write_the_same_200_tokens(folder: Path) -> None:
    mine, theirs = greedy_pair(folder, [1, 5, 9], 200)
    assert mine == theirs


def test_a_prompt_longer_than_the_window_continues_the_same(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path, "mistral", 3, vocab_size=256, hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, sliding_window=32,
    )  # fmt: skip
    prompt = np.random.default_rng(2).integers(0, 256, 150).tolist()
    mine, theirs = greedy_pair(folder, prompt, 200)
    assert mine == theirs
