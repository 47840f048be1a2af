"""Where a model's files lie: the one that ships, a folder, or a name on the Hugging Face hub.

Owns finding the folder and saying what is in it, so that gateway and nodes mean the same model.
Knows nothing of tensors. The only user of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigError

SHIPPED_MODEL = Path(__file__).parent / "models" / "pdq-5m"
SHIPPED_DRAFT = Path(__file__).parent / "models" / "pdq-5m-draft"

_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_SAMPLE_BYTES = 65_536
_SAMPLES = 16


def resolve_model(model: str, revision: str = "") -> Path:
    """The folder of `model`: "" is the shipped one, an existing folder is itself, anything else
    is ORG/NAME on the hub, downloaded once into its cache. Raises `ConfigError`."""
    if not model:
        return SHIPPED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"model folder {model} does not exist", param="model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {model} is neither a folder nor to be had from the hub: {error}", param="model"
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
        revision = content_digest(folder) if any(folder.glob("*.safetensors")) else ""
    if not (revision and overrides):
        return revision
    said = json.dumps(overrides, sort_keys=True).encode()
    return f"{revision}+{hashlib.blake2b(said, digest_size=8).hexdigest()}"


def content_digest(folder: Path) -> str:
    """32 hex digits that tell checkpoints apart: config.json, and of each weight file its size
    and up to 16 pieces of 64 KiB spread over it (reading 100 GB at every start would be too
    slow). Two checkpoints that differ in no sampled byte are taken for one."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
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
