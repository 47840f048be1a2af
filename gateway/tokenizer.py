"""The model's folder as the gateway needs it: text to ids, chat to text, ids to text, and limits.

Owns: reading tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
and config.json; encoding without blocking the event loop. Knows nothing of weights, nor of where
the folder comes from. The only user of `tokenizers` in the gateway.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import CheckpointError, InvalidRequest
from gateway.chat_template import ChatTemplate
from gateway.detokenizer import Decoder, Detokenizer, decoder_for, readable

LONG_TEXT = 8_192  # characters from which encoding leaves the event loop (about 2 ms of work)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests are checked against."""

    vocab_size: int
    max_model_len: int | None  # None: neither config.json nor tokenizer_config.json says
    eos_token_ids: tuple[int, ...]


class Tokenizer:
    """Shared by all requests; every method is safe from any thread."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json", param="tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: {error}", param="tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {
            index
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        config = _read_json(folder / "tokenizer_config.json")
        self.limits = _limits(folder, config, self._tokenizer)
        self._chat_template = _chat_template(folder, config)
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        self._decoder: Decoder = decoder_for(decoder, self._visible_piece, self.decode)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_now(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; a long text is encoded in a thread (the library releases the GIL)."""
        encode = functools.partial(self.encode_now, text, add_special_tokens=add_special_tokens)
        return encode() if len(text) < LONG_TEXT else await asyncio.to_thread(encode)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        return self._decoder.start(prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself, for logprobs; a special token is its own name."""
        if token_id in self._special:
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        return self._decoder.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return readable(self.token_bytes(token_id))

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions", param="messages"
            )
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def _visible_piece(self, token_id: int) -> str | None:
        if token_id in self._special or not 0 <= token_id < 2**32:
            return None
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", param=path.name)
    return value


def _limits(
    folder: Path, tokenizer_config: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> ModelLimits:
    config = _read_json(folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    generation = _read_json(folder / "generation_config.json")
    length = config.get("max_position_embeddings")
    if length is None:
        declared = tokenizer_config.get("model_max_length")
        # "Unlimited" is written there as 1e30.
        length = int(declared) if declared is not None and declared < 2**31 else None
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        name = _token_text(tokenizer_config.get("eos_token"))
        eos = None if name is None else tokenizer.token_to_id(name)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    vocab_size = config.get("vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True)
    return ModelLimits(vocab_size, length, eos_ids)


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    source: Any = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    special = {
        name: text
        for name, value in config.items()
        if name.endswith("_token") and (text := _token_text(value)) is not None
    }
    return ChatTemplate(source, special)
