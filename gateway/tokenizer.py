"""A model's text as the gateway needs it: text to ids, chat to text, ids to text.

Owns: encoding without blocking the event loop. What the model's folder says is read elsewhere
(common/model_folder/).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import CheckpointError, InvalidRequest
from common.model_folder.description import ModelDescription
from common.model_folder.templates import DEFAULT
from gateway.chat_template import ChatTemplate
from gateway.detokenizer import Decoder, Detokenizer, readable
from gateway.patterns import may_backtrack, steps

LOSSLESS_NORMALIZERS = {"NFC": 4, "Prepend": 1, "Replace": 1}
"""Those that keep every character, or put this many into one at most (NFC: the 4 of U+1F82)."""
LOSSLESS_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "Split"})


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
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        }
        template = model.chat_templates.get(DEFAULT)
        self._chat_template = None if template is None else ChatTemplate(template, dict(model.special_tokens))
        pipeline = json.loads(self._tokenizer.to_str())
        self._most_characters = most_characters(pipeline)
        self.may_backtrack = may_backtrack(pipeline)
        self._decoder = Decoder(pipeline["decoder"], self._visible_piece)
        self._full_decoder = Decoder(pipeline["decoder"], self._piece)

    def template_reads(self, name: str) -> bool:
        """Whether the chat template has a variable of this name."""
        return self._chat_template is not None and self._chat_template.reads(name)

    def encode_now(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises `InvalidRequest` for a text that the model's tokenizer fails on."""
        with _failing_as("the model's tokenizer cannot encode this text"):
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without encoding it; 0 where nothing is
        certain."""
        return len(text) // self._most_characters if self._most_characters else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Raises `InvalidRequest` for tokens that the model's decoder fails on."""
        with _failing_as("the model's tokenizer cannot decode these tokens"):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
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

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises `InvalidRequest` for a model that has none."""
        if self._chat_template is None:
            others = ", ".join(map(repr, self.model.chat_templates))
            raise InvalidRequest(
                f"this model has no chat template{others and f' for chats, only {others:.200}'}: "
                "use /v1/completions",
                param="messages",
            )
        return self._chat_template

    def _visible_piece(self, token_id: int) -> str | None:
        piece = self._piece(token_id)
        return None if piece in self._special else piece

    def _piece(self, token_id: int) -> str | None:
        known = 0 <= token_id < 2**32
        piece: str | None = self._tokenizer.id_to_token(token_id) if known else None
        return piece


@contextlib.contextmanager
def _failing_as(message: str) -> Iterator[None]:
    """What the library raises over a text, for a tokenizer of parts that do not go together: bare
    `Exception`, and for a panic not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise InvalidRequest(f"{message}: {error}") from error


def most_characters(pipeline: dict[str, Any]) -> int:
    """How many characters of a text one token may stand for, by the parts of tokenizer.json; 0
    where a part may drop characters, or take any number of them as one unknown token."""
    normalizers = steps(pipeline["normalizer"], "normalizers")
    pre_tokenizers = steps(pipeline["pre_tokenizer"], "pretokenizers")
    model, added = pipeline["model"], pipeline["added_tokens"]
    byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
    certain = (
        model["type"] == "BPE"
        and (byte_level or model.get("byte_fallback") is True)
        and all(step["type"] in LOSSLESS_NORMALIZERS for step in normalizers)
        and all(_only_a_space_is_replaced(step) for step in normalizers)
        and all(step["type"] in LOSSLESS_PRE_TOKENIZERS for step in pre_tokenizers)
        and all(step.get("behavior") != "Removed" for step in pre_tokenizers)
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    )
    if not certain:
        return 0
    longest = max(map(len, (*model["vocab"], *(token["content"] for token in added))), default=1)
    shrink = 1
    for step in normalizers:
        shrink *= LOSSLESS_NORMALIZERS[step["type"]]
    return longest * shrink


def _only_a_space_is_replaced(step: dict[str, Any]) -> bool:
    return step["type"] != "Replace" or (step["pattern"] == {"String": " "} and bool(step["content"]))
