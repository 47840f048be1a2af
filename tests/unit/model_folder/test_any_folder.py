"""Whatever a folder's files say, reading it ends in a description or in one clear error."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import ModelError
from common.model_folder.config_fields import HARMLESS, OFF, ONE, READ
from common.model_folder.description import describe_model, read_config
from common.model_folder.model_config import parse_model_config
from common.model_folder.weight_files import weight_files
from tests.support.checkpoints import STORIES

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 8, 64, 512, 2**31, 10**30])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.just("</s>")
ROPE = st.dictionaries(
    st.sampled_from(
        [
            "rope_type",
            "type",
            "factor",
            "rope_theta",
            "mscale",
            "beta_fast",
            "original_max_position_embeddings",
            "low_freq_factor",
        ]
    ),
    SCALARS | st.sampled_from(["yarn", "linear", "llama3", "dynamic", "default"]),
    max_size=5,
)
TOKEN = st.dictionaries(
    st.sampled_from(["content", "special", "normalized", "lstrip", "__type"]), SCALARS, max_size=3
)
VALUES = st.recursive(
    SCALARS | ROPE | TOKEN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "config.json": sorted(READ | HARMLESS | OFF | ONE | {"hidden_act", "no_rope_layers"}),
    "generation_config.json": [
        "eos_token_id",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_new_tokens",
    ],
    "tokenizer_config.json": [
        "eos_token",
        "bos_token",
        "pad_token",
        "chat_template",
        "model_max_length",
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "add_bos_token",
        "tokenizer_class",
    ],
    "special_tokens_map.json": ["eos_token", "unk_token", "additional_special_tokens"],
    "added_tokens.json": ["<new>", "</s>"],
    "chat_template.json": ["chat_template"],
    "model.safetensors.index.json": ["weight_map"],
}
FOLDERS = st.fixed_dictionaries(
    {},
    optional={
        file: st.dictionaries(st.sampled_from(fields), VALUES, max_size=3) for file, fields in FIELDS.items()
    },
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(files=FOLDERS)
@example(files={"config.json": {"head_dim": 8, "rope_scaling": {"type": "yarn", "factor": 1e-300}}})
def test_a_folder_is_described_or_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    good = json.loads((STORIES / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((STORIES / "tokenizer.json").read_bytes())
    for file in FIELDS:
        (tmp_path / file).unlink(missing_ok=True)
    for file, said in files.items():
        content = {**good, **said} if file == "config.json" else said
        (tmp_path / file).write_text(json.dumps(content))
    with contextlib.suppress(ModelError):
        describe_model(tmp_path)
    with contextlib.suppress(ModelError):
        parse_model_config(read_config(tmp_path, required=True))
    with contextlib.suppress(ModelError):
        weight_files(tmp_path)
