"""Where texts begin: in the user's prompts, or in what the target writes after nothing.

Owns the file of prompts, and which beginnings are held out for measuring. Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.engine.engine import Engine
from common.engine.text import encode
from common.errors import ConfigError
from common.model_folder.description import ModelDescription
from common.sampling import SamplingParams

Beginning = tuple[int, ...]

LENGTHS = (1, 4, 12, 48)  # tokens of a beginning that the target writes by itself
HELD_OUT_EVERY = 16
LARGEST_FILE = 2**30  # bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Beginnings:
    """None of them is empty, and none is in both parts."""

    shown: tuple[Beginning, ...]
    held_out: tuple[Beginning, ...]


def from_file(path: Path, folder: Path, vocab_size: int) -> Beginnings:
    """A text file has a prompt in each line. A `.jsonl` file has objects with a `prompt` or a `text`, which
    is a string or a list of token ids. Empty lines are left out. Raises `ConfigError`, which names the
    line."""
    found: list[Beginning] = []
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"--prompts: there is no file {path}", param="prompts")
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"--prompts: {path} is larger than {LARGEST_FILE >> 20} MiB", param="prompts")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line := line.strip():
                    where = f"--prompts: line {number} of {path}"
                    prompt = _of_object(line, where) if path.suffix == ".jsonl" else line
                    ids = encode(folder, prompt) if isinstance(prompt, str) else prompt
                    if not all(0 <= token < vocab_size for token in ids):
                        raise ConfigError(f"{where} has a token beyond the vocabulary", param="prompts")
                    if ids:
                        found.append(tuple(ids))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {path}: {error}", param="prompts") from error
    return _divided(found, f"--prompts: {path}")


def _of_object(line: str, where: str) -> str | list[int]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", param="prompts") from error
    prompt = value.get("prompt", value.get("text")) if isinstance(value, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise ConfigError(f"{where} has no prompt that is a string or a list of token ids", param="prompts")


def by_target(engine: Engine, description: ModelDescription, count: int, seed: int) -> Beginnings:
    """`count` beginnings of text that the target samples at temperature 1 after `first_tokens`."""
    starts = _first_tokens(engine, description)
    choice = random.Random(f"{seed}/beginnings")
    room = max(1, engine.facts.max_model_len - max(map(len, starts)))
    lengths = [min(choice.choice(LENGTHS), room) for _ in range(count)]
    params = [
        SamplingParams(max_tokens=n, temperature=1.0, seed=seed * 2**32 + i) for i, n in enumerate(lengths)
    ]
    prompts = [choice.choice(starts) for _ in range(count)]
    written = engine.generate(prompts, params)
    stops = set(engine.facts.stop_token_ids)
    found = [
        (*prompt, *(token for token in text.token_ids if token not in stops))
        for prompt, text in zip(prompts, written, strict=True)
    ]
    return _divided(found, "the target's own beginnings")


def _first_tokens(engine: Engine, description: ModelDescription) -> list[Beginning]:
    """What the tokenizer puts before every text; else the token that config.json says begins one, or ends
    the one before; where no file says anything, any token."""
    if description.tokenizer is not None and (ids := encode(engine.facts.folder, "")):
        return [tuple(ids)]
    bos = description.config.get("bos_token_id")
    if type(bos) is int and 0 <= bos < engine.facts.vocab_size:
        return [(bos,)]
    if engine.facts.stop_token_ids:
        return [(engine.facts.stop_token_ids[0],)]
    return [(token,) for token in range(engine.facts.vocab_size)]


def _divided(found: Sequence[Beginning], source: str) -> Beginnings:
    different = list(dict.fromkeys(found))
    if len(different) < 2:
        raise ConfigError(
            f"{source}: {len(different)} different beginnings; at least 2 are needed, one to learn from and "
            "one to measure with",
            param="prompts",
        )
    held_out = different[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or different[-1:]
    apart = set(held_out)
    return Beginnings(tuple(b for b in different if b not in apart), tuple(held_out))


def cycle(beginnings: Sequence[Beginning], choice: random.Random) -> Iterator[Beginning]:
    """All of them in some order, again and again in others."""
    while True:
        yield from choice.sample(beginnings, len(beginnings))
