"""The four forms of a prompt, checked by hand.

A union of four list types would give an error that names no field, and a prompt of 100,000 ids
should not become 100,000 validators.
"""

from __future__ import annotations

from typing import Any

from common.errors import InvalidRequest, TokenOutOfRange

Prompts = list["str | list[int]"]


def parse_prompts(value: Any, max_prompts: int, vocab_size: int) -> Prompts:
    """The four forms of `prompt` as a list of strings or token id lists, none of them empty."""
    prompts: list[Any]
    if isinstance(value, list) and value and not _is_id(value[0]):
        prompts = value
    else:
        prompts = [value]
    if len(prompts) > max_prompts:
        raise InvalidRequest(f"prompt has {len(prompts)} entries, {max_prompts} are allowed", param="prompt")
    for prompt in prompts:
        if not isinstance(prompt, (str, list)):
            raise InvalidRequest(
                "prompt must be a string, a list of strings, a list of token ids or a list of "
                "lists of token ids",
                param="prompt",
            )
        if not prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        if isinstance(prompt, list):
            check_ids(prompt, vocab_size, "prompt")
    return prompts


def check_ids(ids: list[Any], vocab_size: int, param: str) -> None:
    for token_id in ids:
        if not _is_id(token_id):
            raise InvalidRequest(f"{param}: {token_id!r:.40} is no token id", param=param)
        if not 0 <= token_id < vocab_size:
            raise TokenOutOfRange(
                f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}", param=param
            )


def _is_id(value: Any) -> bool:
    return type(value) is int
