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
from safetensors.torch import load_file, save_file

from common.engine import Engine, SamplingParams
from common.errors import ConfigError, UnsupportedModel
from common.model_files import SHIPPED_DRAFT, SHIPPED_MODEL
from common.model_folder.description import read_config
from common.model_folder.model_config import ModelConfig, parse_model_config
from tests.support.checkpoints import BABYLLAMA, STORIES, save_random_model, transformers_model
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
    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(fields=configurations(model_type), length=st.integers(1, 200), seed=st.integers(0, 99))
    def check(fields: dict[str, Any], length: int, seed: int) -> None:
        folder = save_random_model(tmp_path_factory.mktemp("model"), model_type, seed, **fields)
        token_ids = np.random.default_rng(seed).integers(0, fields["vocab_size"], length).tolist()
        assert_same_logits(folder, token_ids, max_num_batched_tokens=64, max_num_seqs=4)

    check()


TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN_64 = YARN | {"original_max_position_embeddings": 64}

CORNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "head_dim 4": ("llama", {"head_dim": 4}),
    "head_dim 20": ("qwen3", {"head_dim": 20}),
    "head_dim 100": ("llama", {"head_dim": 100}),
    "groups of 7": ("llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}),
    "as many keys as queries": ("qwen3", {"num_key_value_heads": 6}),
    "window 1": ("mistral", {"sliding_window": 1}),
    "window of a block": ("mistral", {"sliding_window": 16}),
    "window of a key block and one": ("mistral", {"sliding_window": 65}),
    "some layers with a window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "yarn that contradicts its length": ("llama", {"rope_parameters": YARN_64 | {"factor": 8.0}}),
    "yarn attention_factor": ("llama", {"rope_parameters": YARN_64 | {"attention_factor": 0.7}}),
    "yarn mscale": ("llama", {"rope_parameters": YARN_64 | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    "yarn not truncated": ("llama", {"rope_parameters": YARN_64 | {"truncate": False}}),
    "yarn beta": ("llama", {"rope_parameters": YARN_64 | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "yarn without a length": ("llama", {"rope_parameters": YARN}),
    "flags of another family": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "a large eps": ("llama", {"rms_norm_eps": 0.01}),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners_give_transformers_logits(name: str, tmp_path: Path) -> None:
    model_type, fields = CORNERS[name]
    folder = save_random_model(tmp_path, model_type, 7, **TINY | fields)
    token_ids = np.random.default_rng(1).integers(0, 97, 150).tolist()
    assert_same_logits(folder, token_ids, max_num_batched_tokens=64, max_num_seqs=4)


def change_config(folder: Path, remove: list[str], **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove} | fields))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_the_old_spelling_of_rope_means_the_same(kind: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama", 7, **TINY)
    scaling = {"type": kind, **ROPES[kind]}
    change_config(folder, ["rope_parameters"], rope_theta=5000.0, rope_scaling=scaling)
    assert_same_logits(folder, list(range(90)))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPELLINGS: dict[str, tuple[dict[str, Any], int]] = {  # fields, and the context that follows
    "yarn beyond what was trained": ({"rope_scaling": YARN}, 1024),
    "yarn with its length at the top": ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, 256),
    "the length at the top wins": ({"rope_scaling": YARN_64, "original_max_position_embeddings": 128}, 512),
    "yarn whose factor is null": ({"rope_scaling": YARN_64 | {"factor": None}}, 256),
    "linear beyond what was trained": (
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5e3},
        768,
    ),
    "llama3 with its length at the top": (
        {
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
            "rope_theta": 5e3,
            "original_max_position_embeddings": 64,
        },
        256,
    ),
    "llama3 without a length": ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e3}, 256),
    "rope_scaling beside rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN_64},
        256,
    ),
    "an empty rope_scaling beside it": (
        {"rope_parameters": YARN_64 | {"rope_theta": 5e3}, "rope_scaling": {}},
        256,
    ),
    "three bases": (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_theta": 5e3,
        },
        512,
    ),
    "the older theta beside rope_parameters": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e3},
        512,
    ),
}


def model_config(folder: Path) -> ModelConfig:
    return parse_model_config(read_config(folder, required=True))


@pytest.mark.parametrize("name", SPELLINGS)
def test_rope_reaches_and_turns_as_its_spelling_says(name: str, tmp_path: Path) -> None:
    fields, context = SPELLINGS[name]
    folder = save_random_model(tmp_path, "llama", 7, **TINY)
    change_config(folder, ["rope_parameters"], **fields)
    assert model_config(folder).rope.positions == context
    token_ids = np.random.default_rng(1).integers(0, 97, min(context - 1, 600)).tolist()
    assert_same_logits(folder, token_ids, max_num_batched_tokens=64, max_num_seqs=1)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.5, 6.0, 16.0],
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"attention_factor": 1.3}])
def test_longrope_turns_by_the_set_for_the_positions_that_are_served(
    model_type: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """Each set where transformers uses it: the long one for sequences beyond what was trained."""
    folder = save_random_model(tmp_path, model_type, 7, **TINY, rope_parameters=LONGROPE | more)
    assert model_config(folder).rope.positions == 256
    token_ids = np.random.default_rng(1).integers(0, 97, 200).tolist()
    assert_same_logits(folder, token_ids)
    assert_same_logits(folder, token_ids[:63], max_model_len=64)


def test_nodes_with_other_sets_of_longrope_do_not_go_together(tmp_path: Path) -> None:
    """Their keys are turned otherwise, so a handoff would be of another model's."""
    folder = save_random_model(tmp_path, "llama", 7, **TINY, rope_parameters=LONGROPE)
    short, middle, long = (
        Engine.load(folder, max_model_len=length, num_kv_blocks=8).fingerprint for length in (64, 65, 256)
    )
    assert middle.mismatch(long) is None
    differs = short.mismatch(long)
    assert differs is not None
    assert differs.field == "numerics"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"long_factor": None}, "rope_parameters.long_factor"),
        ({"long_factor": [1.0] * 3}, "rope_parameters.long_factor"),
        ({"long_factor": [1.0, 1.0, 1.0, 0]}, "rope_parameters.long_factor"),
        ({"long_factor": [1.0, 1.0, 1.0, None]}, "rope_parameters.long_factor"),
        ({"long_factor": [1.0, 1.0, 1.0, "2"]}, "rope_parameters.long_factor"),
        ({"attention_factor": -1.0}, "rope_parameters.attention_factor"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
    ],
)
def test_a_longrope_that_cannot_be_computed_is_refused_by_name(
    fields: dict[str, Any], param: str, tmp_path: Path
) -> None:
    folder = save_random_model(tmp_path, "llama", 7, **TINY)
    change_config(folder, [], rope_parameters=LONGROPE | fields)
    with pytest.raises(UnsupportedModel) as caught:
        Engine.load(folder, num_kv_blocks=8)
    assert caught.value.param == param


def test_a_scaling_without_a_base_has_the_base_of_the_model(tmp_path: Path) -> None:
    """Qwen's cards have users write `rope_scaling`; transformers 5 writes the base elsewhere."""
    folder = save_random_model(tmp_path, "qwen3", 7, **TINY)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    change_config(folder, [], rope_scaling=scaling, rope_parameters={"rope_theta": 1e6})
    rope = model_config(folder).rope
    assert (rope.kind, rope.theta, rope.positions) == ("yarn", 1e6, 256)


def test_a_length_beyond_what_the_rope_reaches_is_refused(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama", 7, **TINY)
    change_config(folder, ["rope_parameters"], rope_scaling=YARN)
    assert Engine.load(folder, max_model_len=1024, num_kv_blocks=8).facts.max_model_len == 1024
    with pytest.raises(ConfigError, match=r"1025.*1024"):
        Engine.load(folder, max_model_len=1025, num_kv_blocks=8)


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_any_block_size_gives_transformers_logits(block_size: int, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "mistral", 7, **TINY, sliding_window=5)
    assert_same_logits(folder, list(range(95)), block_size=block_size)


def test_what_a_config_does_not_say_is_what_transformers_assumes(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path, "mistral", 7, **TINY | {"num_attention_heads": 16, "num_key_value_heads": 8}
    )
    change_config(folder, ["num_key_value_heads", "sliding_window"])
    assert_same_logits(folder, list(range(90)))
    assert model_config(folder).windows == (4096, 4096)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_tied_head_that_is_stored_too_counts_where_it_differs(scale: float, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama", 7, **TINY, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(1) * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(folder, list(range(90)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_another_dtype_is_converted(stored: torch.dtype, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "qwen3", 7, **TINY)
    path = folder / "model.safetensors"
    save_file({k: v.to(stored) for k, v in load_file(path).items()}, path, {"format": "pt"})
    assert_same_logits(folder, list(range(90)))


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path,
        "llama",
        5,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        max_shard_size="60KB",
    )
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
            torch.tensor([token_ids]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(mine.token_ids), theirs[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("folder", REAL_MODELS, ids=lambda folder: folder.name)
def test_real_models_write_the_same_80_tokens(folder: Path) -> None:
    mine, theirs = greedy_pair(folder, [1, 5, 9], 80)
    assert mine == theirs


def test_a_prompt_longer_than_the_window_continues_the_same(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path,
        "mistral",
        3,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=32,
    )
    prompt = np.random.default_rng(2).integers(0, 256, 150).tolist()
    mine, theirs = greedy_pair(folder, prompt, 200)
    assert mine == theirs
