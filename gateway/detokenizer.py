"""Token ids to text, one token at a time, never half a character.

Owns: one stream of tokens through the stages of its tokenizer's decoder, and where a completion
begins. The promise, for any ids: all that `push` returned plus `finish` equals decoding all ids at
once. Knows nothing of stop strings or requests.

A completion continues its prompt: the space before its first word belongs to it, though decoding
the completion alone would strip it, and a character that the prompt began belongs to it once it is
whole. So a detokenizer is made with the prompt's ids.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.decoder_stages import CACHED, ByteRuns, Bytes, Stage, fallback_byte, piece_bytes, stages_of

TAIL = 16  # tokens of a prompt that may decide how its continuation begins
LONGEST_RUN = 1024  # byte tokens before them, where the prompt ends in a run of such
MOST_LOOKED_AT = 4096  # tokens, visible or not, in search of them

Piece = Callable[[int], "str | None"]  # a token's own string; None: special or unknown, no text


class Decoder:
    """The decoder of one tokenizer: shared, immutable."""

    def __init__(self, config: dict[str, Any] | None, piece: Piece) -> None:
        """`config` is the `decoder` entry of tokenizer.json. Raises `UnsupportedModel`."""
        self._factories = stages_of(config)
        self._piece = functools.lru_cache(CACHED)(piece)

    def start(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for what follows `prompt_ids`."""
        tail, begun = self._tail(prompt_ids)
        detokenizer = Detokenizer(self._piece, [make(begun) for make in self._factories])
        detokenizer.skip(tail)
        return detokenizer

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; empty for special and unknown ones."""
        piece = self._piece(token_id)
        if piece is None:
            return b""
        stages = [make(True) for make in self._factories]
        if any(isinstance(stage, Bytes) for stage in stages):
            return piece_bytes(piece)
        byte = fallback_byte(piece)
        if byte is not None and any(isinstance(stage, ByteRuns) for stage in stages):
            return bytes([byte])
        alone = Detokenizer(self._piece, stages)
        return (alone.push(token_id) + alone.finish()).encode()

    def _tail(self, prompt_ids: Sequence[int]) -> tuple[list[int], bool]:
        """The last visible tokens of a prompt, and whether there are others before them."""
        tail: list[int] = []
        for token_id in itertools.islice(reversed(prompt_ids), MOST_LOOKED_AT):
            piece = self._piece(token_id)
            if piece is None:
                continue
            in_run = fallback_byte(piece) is not None and len(tail) < LONGEST_RUN
            if len(tail) >= TAIL and not in_run:
                return tail[::-1], True
            tail.append(token_id)
        return tail[::-1], len(prompt_ids) > MOST_LOOKED_AT


class Detokenizer:
    """One stream. `copy()` makes another that goes on from the same place."""

    def __init__(self, piece: Piece, stages: list[Stage]) -> None:
        self._piece = piece
        self._stages = stages
        self._due = ""  # what the text would begin with if the prompt were all; not ours to give

    def copy(self) -> Detokenizer:
        made = Detokenizer(self._piece, [copy.copy(stage) for stage in self._stages])
        made._due = self._due
        return made

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often its own, sometimes none."""
        piece = self._piece(token_id)
        return "" if piece is None else self._owed(self._through((piece,)))

    def push_all(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        return self._owed(self._ended())

    def skip(self, prompt_ids: Iterable[int]) -> None:
        """Go through the end of a prompt, whose text is not part of ours."""
        self.push_all(prompt_ids)
        for stage in self._stages:
            if isinstance(stage, ByteRuns):
                stage.forget_whole_characters()
        self._due = self.copy()._ended()

    def _through(self, pieces: Sequence[str], first_stage: int = 0) -> str:
        for stage in self._stages[first_stage:]:
            pieces = [out for piece in pieces for out in stage.feed(piece)]
        return "".join(pieces)

    def _ended(self) -> str:
        return "".join(self._through(stage.end(), index) for index, stage in enumerate(self._stages, 1))

    def _owed(self, text: str) -> str:
        """`text` without the prompt's part. An unfinished character at the prompt's end is held; if
        it is never finished it becomes U+FFFD, which the prompt has already."""
        if not self._due or not text:
            return text
        pairs = enumerate(zip(self._due, text, strict=False))
        shorter = min(len(self._due), len(text))
        common = next((index for index, (one, other) in pairs if one != other), shorter)
        self._due = self._due[common:] if common == len(text) else ""
        return text[common:]


@functools.lru_cache(maxsize=65536)
def readable(data: bytes) -> str:
    """A token's bytes as text; a part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
