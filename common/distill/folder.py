"""The folder of a draft: an ordinary checkpoint, with the files of its target's tokenizer.

Owns its files, and that it is whole or not there: it is made beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.distill.network import Shape
from common.engine.model.weights import write_weights
from common.errors import ConfigError, ResourceError
from common.model_files import TOKENIZER_FILES

CARD = "README.md"
MEASURED = "acceptance.json"


def check_output(output: Path) -> None:
    """`ConfigError` for a place that is taken."""
    try:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"--output: {output} is a file", param="output")
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"--output: {output} is not empty; nothing is written over", param="output")
    except OSError as error:
        raise ConfigError(f"--output: cannot use {output}: {error}", param="output") from error


@contextlib.contextmanager
def made_beside(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the context ends, and is gone if it ends with an error.
    Raises `ResourceError` for what the disk does not do."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ResourceError(f"--output: cannot write to {output.parent}: {error}", param="output") from error
    try:
        try:
            yield unfinished
            unfinished.chmod(0o755)
            unfinished.rename(output)  # over an empty folder, too
        except OSError as error:
            raise ResourceError(f"--output: cannot write {output}: {error}", param="output") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_draft(
    into: Path, target: Path, target_config: Mapping[str, Any], shape: Shape, weights: Mapping[str, Tensor]
) -> None:
    """Weights in bf16, configuration, and the target's files for its tokenizer and how it ends."""
    write_weights(into, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    write_json(into / "config.json", config_of(shape, target_config))
    for name in TOKENIZER_FILES:
        if (target / name).is_file():
            shutil.copyfile(target / name, into / name)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_of(shape: Shape, special: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a `LlamaForCausalLM`; the ids of special tokens are those of `special`."""
    ids = {name: special.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        **ids,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
