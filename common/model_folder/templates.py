"""Where a model's chat templates stand: in files of their own, or inside other files.

Owns: which file holds, and templates by name ("default" is the one for chats). Knows nothing of
jinja2: rendering is the gateway's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.model_folder.reading import read_object, read_text, wrong

DEFAULT = "default"
MAX_TEMPLATES = 64


def chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. A later source holds: `tokenizer_config.json`, `chat_template.json`,
    `chat_template.jinja`, and `additional_chat_templates/NAME.jinja`."""
    found = _named(tokenizer_config.get("chat_template"), "tokenizer_config.json")
    older = read_object(folder / "chat_template.json")
    found |= _named(older.get("chat_template"), "chat_template.json")
    own = folder / "chat_template.jinja"
    if own.exists() or own.is_symlink():
        found[DEFAULT] = _text(folder, own)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))[:MAX_TEMPLATES]:
        found[path.stem] = _text(folder, path)
    return found


def _named(value: Any, file: str) -> dict[str, str]:
    """One template, or several: a list of name and template, or an object by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        entries = [
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            for entry in value
        ]
    elif isinstance(value, dict):
        entries = list(value.items())
    else:
        entries = [(None, None)]
    if not all(isinstance(part, str) for entry in entries for part in entry):
        raise wrong(file, "chat_template", "a template or templates by name", value)
    return dict(entries)  # type: ignore[arg-type]


def _text(folder: Path, path: Path) -> str:
    """What a template says is shown to clients, as prompts. So a link may not lead to any file of
    the machine: only inside the folder, and to the blobs of the hub's cache, which is all links."""
    target = path.resolve()
    allowed = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link out of the model's folder", param=str(path))
    return read_text(path)
