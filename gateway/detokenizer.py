"""Token ids to text, one token at a time, never half a character.

Owns: the incremental form of each tokenizer decoder. The promise, for any ids: all that `push`
returned plus `finish` equals decoding all ids at once. Knows nothing of stop strings or requests.

Which text is safe to let go depends on the decoder, so there is one class for each kind:

- byte-level BPE: a token is bytes; hold the bytes of an unfinished UTF-8 character (at most 3).
- SentencePiece with byte fallback: a token is text, or `<0xNN>`. A run of such bytes is text only
  if *all* of it is valid UTF-8 (otherwise each byte becomes U+FFFD), so a run is held to its end.
- any other: decode a short window with one step of context, hold it while it ends in U+FFFD.

A completion continues its prompt: the space before its first word belongs to it, though decoding
the completion alone would strip it. So a detokenizer is made with the prompt's ids.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes of UTF-8
WINDOW = 16  # tokens that the windowed decoder holds at most

Piece = Callable[[int], "str | None"]  # a token's own string; None: special or unknown, no text


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often its own, sometimes none."""

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""


class Decoder(Protocol):
    """The decoder of one tokenizer: shared, immutable."""

    def start(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for what follows `prompt_ids`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for by itself; empty for special and unknown ones."""


def decoder_for(
    config: dict[str, Any] | None, piece: Piece, decode: Callable[[list[int]], str]
) -> Decoder:
    """The decoder that `config` (the `decoder` entry of tokenizer.json) describes.

    `decode` decodes ids at once, skipping special tokens; only the windowed decoder uses it.
    """
    if config is not None and config["type"] == "ByteLevel":
        return ByteLevelDecoder(piece)
    if (recipe := _byte_fallback_recipe(config)) is not None:
        return ByteFallbackDecoder(piece, recipe)
    return WindowDecoder(piece, decode)


# ── Byte-level BPE ───────────────────────────────────────────────────────────────────────────────


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_level_alphabet()


class ByteLevelDecoder:
    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._piece(token_id) or ""
            try:
                known = bytes([_ALPHABET[character] for character in piece])
            except KeyError:  # an added token, written as itself
                known = piece.encode()
            self._bytes[token_id] = known
        return known

    def start(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self.token_bytes(token_id) + tail
            if len(tail) >= LONGEST_CHARACTER:
                break
        return _ByteLevel(self, tail)


class _ByteLevel:
    def __init__(self, decoder: ByteLevelDecoder, tail: bytes) -> None:
        self._bytes_of = decoder.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(tail)

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


# ── SentencePiece with byte fallback ─────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    replacements: tuple[tuple[str, str], ...]
    strip: str
    strip_start: int


def _byte_fallback_recipe(config: dict[str, Any] | None) -> _Recipe | None:
    """Reads `Replace* ByteFallback Fuse Strip?`, what every converted SentencePiece model has."""
    if config is None or config["type"] != "Sequence":
        return None
    steps = list(config["decoders"])
    replacements = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    strip, strip_start = " ", 0
    if steps and steps[-1]["type"] == "Strip" and steps[-1]["stop"] == 0:
        step = steps.pop()
        strip, strip_start = step["content"], step["start"]
    if [step["type"] for step in steps] != ["ByteFallback", "Fuse"]:
        return None
    return _Recipe(tuple(replacements), strip, strip_start)


class ByteFallbackDecoder:
    def __init__(self, piece: Piece, recipe: _Recipe) -> None:
        self._piece = piece
        self.recipe = recipe
        self._parts: dict[int, str | bytes | None] = {}

    def part(self, token_id: int) -> str | bytes | None:
        """Text, or one byte of a run, or None for a token that decoding skips."""
        if token_id not in self._parts:
            self._parts[token_id] = self._make_part(self._piece(token_id))
        return self._parts[token_id]

    def _make_part(self, piece: str | None) -> str | bytes | None:
        if piece is None:
            return None
        for pattern, content in self.recipe.replacements:
            piece = piece.replace(pattern, content)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                return piece
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        part = self.part(token_id)
        return part if isinstance(part, bytes) else (part or "").encode()

    def start(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        run = b""
        for token_id in reversed(prompt_ids[-LONGEST_CHARACTER:]):
            part = self.part(token_id)
            if isinstance(part, str):
                break
            run = (part or b"") + run
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(run)
        begun = any(self.part(token_id) is not None for token_id in prompt_ids)
        return _ByteFallback(self, utf8.getstate()[0], 0 if begun else self.recipe.strip_start)


class _ByteFallback:
    def __init__(self, decoder: ByteFallbackDecoder, run: bytes, to_strip: int) -> None:
        self._part = decoder.part
        self._strip = decoder.recipe.strip
        self._to_strip = to_strip
        self._run = bytearray(run)

    def push(self, token_id: int) -> str:
        part = self._part(token_id)
        if part is None:
            return ""
        if isinstance(part, bytes):
            self._run += part
            return ""
        return self._stripped(self._end_run() + part if self._run else part)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._strip):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


# ── Anything else ────────────────────────────────────────────────────────────────────────────────


class WindowDecoder:
    def __init__(self, piece: Piece, decode: Callable[[list[int]], str]) -> None:
        self._piece = piece
        self._decode = decode

    def token_bytes(self, token_id: int) -> bytes:
        return (self._piece(token_id) or "").encode()

    def start(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        return _Window(self._decode, list(prompt_ids[-WINDOW:]))


class _Window:
    """`ids[:settled]` is context whose text is out; the rest waits until it ends in a character."""

    def __init__(self, decode: Callable[[list[int]], str], context: list[int]) -> None:
        self._decode = decode
        self._ids = context
        self._settled = len(context)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(force=len(self._ids) - self._settled >= WINDOW)

    def finish(self) -> str:
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        before = self._decode(self._ids[: self._settled])
        text = self._decode(self._ids)
        if not force and (text.endswith(REPLACEMENT) or not text.startswith(before)):
            return ""
        if text != before:
            self._ids = self._ids[self._settled :]
        self._ids = self._ids[-WINDOW:]
        self._settled = len(self._ids)
        return text[len(before) :]


# ── For logprobs ─────────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=65536)
def readable(data: bytes) -> str:
    """A token's bytes as text; a part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
