"""One description of a model, made from its folder, for gateway and nodes alike.

    describe_model(folder) ─▶ ModelDescription: context, vocabulary, stop ids, templates, defaults

Owns: which file says what, and what holds where several speak or none does. Two processes that
read the same folder with the same settings have the same description, and `tokenizer_digest`
shows it where folders are two. Knows nothing of weights: what the decoder computes is read from
`config` by the engine (common/model_folder/model_config.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import ConfigError, UnsupportedModel
from common.model_folder.generation import SamplingDefaults, sampling_defaults, stop_token_ids
from common.model_folder.reading import integer, number, read_object, section
from common.model_folder.rope import parse_rope
from common.model_folder.templates import chat_templates
from common.model_folder.tokenizer import load_tokenizer, tokenizer_digest

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
UNLIMITED = 2**31  # `model_max_length` of a tokenizer without a limit is 1e30

# What transformers assumes where `config.json` is silent.
MAX_POSITION_EMBEDDINGS: Mapping[str, int] = {
    "llama": 2048,
    "mistral": 131_072,
    "qwen2": 32_768,
    "qwen3": 32_768,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelDescription:
    """`context_length` is in tokens, None where no file says it. `vocab_size` counts the rows of
    the embedding; the tokenizer may know fewer ids, and rows without a token have no text.
    `tokenizer` is None, and `tokenizer_digest` empty, in a folder without one."""

    folder: Path
    config: Mapping[str, Any]
    context_length: int | None
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    sampling_defaults: SamplingDefaults
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    tokenizer: tokenizers.Tokenizer | None
    tokenizer_digest: str


def parse_overrides(text: str) -> dict[str, Any]:
    """The object that `--hf-overrides` gives as JSON, {} for ""; raises `ConfigError`."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"hf_overrides is not JSON: {error}", param="hf_overrides") from error
    if not isinstance(value, dict):
        raise ConfigError("hf_overrides must be a JSON object", param="hf_overrides")
    return value


def read_config(
    folder: Path, overrides: Mapping[str, Any] | None = None, *, required: bool = False
) -> dict[str, Any]:
    """`config.json`, with `overrides` in place of its fields (an object is merged with the one it
    meets); of a model with several parts the fields of its text part, and of the whole where that
    part says nothing. `eos_token_id` has the ids of both."""
    config = read_object(folder / CONFIG, required=required)
    for field, value in (overrides or {}).items():
        old = config.get(field)
        config[field] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    text = section(config, "text_config", CONFIG)
    merged = {**config, **{name: value for name, value in text.items() if value is not None}}
    ends = [part["eos_token_id"] for part in (config, text) if part.get("eos_token_id") is not None]
    if len(ends) == 2:
        lists = [end if isinstance(end, list) else [end] for end in ends]
        merged["eos_token_id"] = [*lists[0], *lists[1]]
    return merged


def describe_model(
    folder: Path, config: Mapping[str, Any] | None = None, *, with_sampling_defaults: bool = True
) -> ModelDescription:
    """The description of the model in `folder`, every file of which may be missing. `config` is
    what `read_config` gives, where the caller has read it already. The model's own defaults are
    neither read nor checked unless `with_sampling_defaults`.

    Raises `CheckpointError` for a file that cannot be read, `UnsupportedModel` for a field that
    cannot be used; either names it.
    """
    config = read_config(folder) if config is None else config
    generation = read_object(folder / GENERATION_CONFIG)
    tokenizer_config = read_object(folder / TOKENIZER_CONFIG)
    declared = integer(config, "vocab_size", CONFIG)
    found = load_tokenizer(folder, tokenizer_config, str(config.get("model_type")), declared)
    vocab_size = declared or (found.tokenizer.get_vocab_size() if found else 0)
    stop_ids = stop_token_ids(
        [(GENERATION_CONFIG, generation), (CONFIG, config)], found.eos_token_id if found else None, vocab_size
    )
    return ModelDescription(
        folder=folder,
        config=config,
        context_length=context_length(config, tokenizer_config),
        vocab_size=vocab_size,
        stop_token_ids=stop_ids,
        sampling_defaults=sampling_defaults(generation if with_sampling_defaults else {}),
        special_tokens=found.special_tokens if found else {},
        chat_templates=chat_templates(folder, tokenizer_config),
        tokenizer=found.tokenizer if found else None,
        tokenizer_digest=tokenizer_digest(found.tokenizer, stop_ids) if found else "",
    )


def context_length(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    """Positions that the model reaches with its rope; without a word about them in `config.json`
    what the tokenizer's says, if it says anything."""
    trained = integer(config, "max_position_embeddings", CONFIG)
    if trained is None:
        trained = MAX_POSITION_EMBEDDINGS.get(str(config.get("model_type")))
    if trained is not None:
        return parse_rope(config, trained).positions
    declared = number(tokenizer_config, "model_max_length", TOKENIZER_CONFIG)
    if declared is None or declared >= UNLIMITED:
        return None
    if declared < 1:
        raise UnsupportedModel(
            f"{TOKENIZER_CONFIG}: model_max_length must be positive, not {declared!r}",
            param="model_max_length",
        )
    return int(declared)
