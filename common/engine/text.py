"""Text for in-process use: a checkpoint's own tokenizer, loaded once.

Served requests arrive as token ids; the gateway tokenizes. This is for scripts and tests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from common.errors import CheckpointError
from common.model_folder.description import describe_model


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer | None:
    return describe_model(folder).tokenizer


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of `text`, with the special tokens that the tokenizer adds by itself."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer", param=str(folder))
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def decode(folder: Path, token_ids: Sequence[int]) -> str | None:
    """Text of token ids; None when the checkpoint has no tokenizer."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return None
    text: str = tokenizer.decode(list(token_ids))
    return text
