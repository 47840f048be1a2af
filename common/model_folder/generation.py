"""What `generation_config.json` and its neighbours say about writing: defaults, and where to stop.

Owns: the model's own sampling defaults, and which ids end a sequence. Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import InvalidRequest
from common.model_folder.reading import integer, is_int, number, wrong
from common.sampling import SamplingParams

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that says nothing; `max_tokens` None: as much as there is room for.

    As in vLLM, `do_sample` is not read: many models carry `false` there beside a temperature.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """The defaults in a `generation_config.json`; raises `UnsupportedModel` for what no request
    could ask for either."""
    top_k = integer(generation, "top_k", FILE, least=-1)
    found = {
        "temperature": number(generation, "temperature", FILE),
        "top_p": number(generation, "top_p", FILE),
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": number(generation, "min_p", FILE),
        "repetition_penalty": number(generation, "repetition_penalty", FILE),
        "max_tokens": integer(generation, "max_new_tokens", FILE),
    }
    defaults = {name: value for name, value in found.items() if value is not None}
    try:
        SamplingParams(**defaults)  # type: ignore[arg-type]
    except InvalidRequest as error:
        field = "max_new_tokens" if error.param == "max_tokens" else str(error.param)
        raise wrong(FILE, field, "one that a request could have", generation.get(field)) from error
    return SamplingDefaults(**defaults)  # type: ignore[arg-type]


def stop_token_ids(
    sources: Iterable[tuple[str, Mapping[str, Any]]], tokenizer_eos: int | None, vocab_size: int
) -> tuple[int, ...]:
    """Every id that any file names as the end: a sequence ends at each of them.

    Files are often written by different people: a fine-tune for chats keeps the base model's id in
    one and has its own in another. An absent or null field says nothing. Raises `UnsupportedModel`
    for ids that a vocabulary of `vocab_size` (0: unknown) does not have.
    """
    end = vocab_size or 2**31
    found: dict[int, None] = {}
    for file, source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not is_int(token) or not 0 <= token < end:
                wanted = f"token ids in [0, {end}), the vocabulary"
                raise wrong(file, "eos_token_id", wanted, value)
            found[token] = None
    if tokenizer_eos is not None and tokenizer_eos < end:
        found[tokenizer_eos] = None
    return tuple(found)
