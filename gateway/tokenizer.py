"""A model's text as the gateway needs it: text to ids, chat to text, ids to text.

Owns: encoding without blocking the event loop. What the model's folder says is read elsewhere
(common/model_folder/).
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from typing import Any

from common.errors import CheckpointError, InvalidRequest
from common.model_folder.description import ModelDescription
from gateway.chat_template import ChatTemplate
from gateway.detokenizer import Decoder, Detokenizer, readable

LONG_TEXT = 8_192  # characters from which encoding leaves the event loop (about 2 ms of work)


class Tokenizer:
    """Shared by all requests; every method is safe from any thread."""

    def __init__(self, model: ModelDescription) -> None:
        """Raises `CheckpointError` for a model whose folder has no tokenizer."""
        if model.tokenizer is None:
            raise CheckpointError(
                f"{model.folder} has no tokenizer.json", param=str(model.folder / "tokenizer.json")
            )
        self.model = model
        self._tokenizer = model.tokenizer
        self._special = {
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.special
        }
        templates = model.chat_templates
        template = templates.get("default") or next(iter(templates.values()), None)
        self._chat_template = (
            None if template is None else ChatTemplate(template, dict(model.special_tokens))
        )
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        self._decoder = Decoder(decoder, self._visible_piece)
        self._full_decoder = Decoder(decoder, self._piece)

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

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        decoder = self._decoder if skip_special_tokens else self._full_decoder
        return decoder.start(prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself, for logprobs; a special token is its own name."""
        piece = self._piece(token_id)
        if piece is not None and piece in self._special:
            return piece.encode()
        return self._decoder.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return readable(self.token_bytes(token_id))

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions", param="messages"
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def _visible_piece(self, token_id: int) -> str | None:
        piece = self._piece(token_id)
        return None if piece in self._special else piece

    def _piece(self, token_id: int) -> str | None:
        known = 0 <= token_id < 2**32
        piece: str | None = self._tokenizer.id_to_token(token_id) if known else None
        return piece
