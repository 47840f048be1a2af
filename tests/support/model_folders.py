"""Folders of a model's small files, as tests write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.model_folder.description import ModelDescription, describe_model
from tests.support.checkpoints import STORIES


def write(folder: Path, **files: Any) -> Path:
    """Files by name, with `_` before the ending; text as it is, anything else as JSON."""
    for name, value in files.items():
        stem, _, suffix = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{stem}.{suffix}").write_text(text)
    return folder


def described(folder: Path, *, tokenizer: Path | None = STORIES, **files: Any) -> ModelDescription:
    """The description of these files beside the `tokenizer.json` of a real model."""
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return describe_model(write(folder, **files))
