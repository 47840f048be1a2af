"""Text for in-process use: a checkpoint's own tokenizer, loaded once.

Served requests arrive as token ids; the gateway tokenizes. This is for scripts and tests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from common.errors import CheckpointError


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path} cannot be read: {error}", param=str(path)) from error


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of `text`, with the special tokens that the tokenizer adds by itself."""
    ids: list[int] = _tokenizer(folder).encode(text).ids
    return ids


def decode(folder: Path, token_ids: Sequence[int]) -> str | None:
    """Text of token ids; None when the checkpoint has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return None
    text: str = _tokenizer(folder).decode(list(token_ids))
    return text
