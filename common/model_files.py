"""Where a model's files lie: the one that ships, a folder, or a name on the Hugging Face hub.

Owns finding the folder and saying what is in it, so that gateway and nodes mean the same model.
Knows nothing of tensors. The only user of huggingface_hub.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigError
from common.model_folder.description import read_config
from common.model_folder.model_config import parse_model_config
from common.model_folder.weight_files import INDEX, SINGLE, weight_files

SHIPPED_MODEL = Path(__file__).parent / "models" / "pdq-5m"
SHIPPED_DRAFT = Path(__file__).parent / "models" / "pdq-5m-draft"

# Exact names: a pattern such as *.json would take whole folders of other formats along.
TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_SMALL_FILES = ("config.json", *TOKENIZER_FILES, INDEX)
_TEMPLATES = "additional_chat_templates/*.jinja"
_SAMPLE_BYTES = 65_536
_SAMPLES = 16


def resolve_model(
    model: str, revision: str = "", *, weights: bool = False, overrides: Mapping[str, Any] | None = None
) -> Path:
    """The folder of `model`: "" is the shipped one, an existing folder is itself, anything else
    is ORG/NAME on the hub, downloaded once into its cache.

    Of a model from the hub come the small files; with `weights` also its safetensors files
    (weight_files.py), after its config (with `overrides`) was found to be one that we can run.
    Raises `ConfigError`, or `ModelError` for what is wrong with the model.
    """
    if not model:
        return SHIPPED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"model folder {model} does not exist", param="model")
    folder = _download(model, revision, [*_SMALL_FILES, _TEMPLATES])
    if weights:
        parse_model_config(read_config(folder, overrides, required=True))
        # Of the same commit, whatever was pushed meanwhile. Only the hub knows whether there is one
        # file, which would hold before an index.
        folder = _download(model, folder.name, [SINGLE])
        if (names := weight_files(folder)) != [SINGLE]:
            folder = _download(model, folder.name, [glob.escape(name) for name in names])
        if missing := [name for name in names if not (folder / name).exists()]:
            raise CheckpointError(
                f"model {model} has no {missing[0]} on the hub: only weights in safetensors files "
                "can be loaded",
                param=missing[0],
            )
    return folder


def _download(model: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # its own errors, and those of the HTTP library that it uses
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model {model} is neither a folder nor to be had from the hub: {reason}", param="model"
        ) from error


def model_name(model: str, folder: Path) -> str:
    """The name clients use when the settings give none."""
    return model if model and not Path(model).expanduser().is_dir() else folder.name


def model_revision(folder: Path, overrides: Mapping[str, Any] | None = None) -> str:
    """Which weights are in `folder` and what is made of them, the same in every process that has
    them: the commit of a snapshot from the hub, else `content_digest`; "" in a folder without
    weights. `overrides` of config.json make another revision."""
    snapshots = folder.resolve().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        revision = folder.resolve().name
    else:
        revision = content_digest(folder) if _has_weights(folder) else ""
    if not (revision and overrides):
        return revision
    said = json.dumps(overrides, sort_keys=True).encode()
    return f"{revision}+{hashlib.blake2b(said, digest_size=8).hexdigest()}"


def _has_weights(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in weight_files(folder))


def content_digest(folder: Path) -> str:
    """32 hex digits that tell checkpoints apart: config.json, and of each weight file its size
    and up to 16 pieces of 64 KiB spread over it (reading 100 GB at every start would be too
    slow). Two checkpoints that differ in no sampled byte are taken for one."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in [folder / name for name in weight_files(folder)]:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                step = max(_SAMPLE_BYTES, size // _SAMPLES)
                for offset in range(0, size, step):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", param=str(folder)) from error
    return digest.hexdigest()
