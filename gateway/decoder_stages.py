"""The steps of a tokenizer's decoder, one piece at a time.

Owns: a streaming form of every decoder of the `tokenizers` library, alone or in a `Sequence`. The
promise: what all `feed` and the last `end` return, joined, is what the library makes of all pieces
at once. The library decodes a list of pieces to a list of pieces and joins it; so a stage takes a
piece and returns those that became certain. Two of them (`Fuse`, `ByteLevel`) make one long piece
of all: stages behind them take it in parts, as text.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders

from common.errors import UnsupportedModel

REPLACEMENT = "\ufffd"
CACHED = 65_536

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>", re.ASCII)


class Stage(Protocol):
    """One step of one stream. What it holds is immutable, so that `copy.copy` forks the stream."""

    def feed(self, piece: str) -> Sequence[str]:
        """The pieces that are certain now."""

    def end(self) -> Sequence[str]:
        """What was held back."""


Factory = Callable[[bool], Stage]
"""Makes the stage of a new stream; the argument says whether pieces came before its first."""


def stages_of(config: dict[str, Any] | None) -> list[Factory]:
    """The stages that `config` (the `decoder` entry of tokenizer.json) describes."""
    if config is None:  # the library joins with spaces
        return [_each(lambda piece: piece, lambda piece: " " + piece)]
    stages: list[Factory] = []
    fused = False
    for step in _flat(config):
        kind = step["type"]
        if kind in ("Fuse", "ByteLevel") and not fused:
            fused = True
            stages += [] if kind == "Fuse" else [lambda begun: Bytes()]
        elif kind != "Fuse":
            stages += _of_text(step) if fused else [_of_pieces(step)]
    return stages


def fallback_byte(piece: str) -> int | None:
    """The byte that SentencePiece's `<0xNN>` stands for."""
    match = _BYTE.fullmatch(piece)
    return int(match[1], 16) if match else None


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece of byte-level BPE stands for."""
    try:
        return bytes([_ALPHABET[character] for character in piece])
    except KeyError:  # an added token, written as itself
        return piece.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _flat(config: dict[str, Any]) -> list[dict[str, Any]]:
    if config["type"] != "Sequence":
        return [config]
    return [step for inner in config["decoders"] for step in _flat(inner)]


def _of_pieces(step: dict[str, Any]) -> Factory:
    kind = step["type"]
    if kind == "ByteFallback":
        return lambda begun: ByteRuns()
    if kind == "BPEDecoder":
        return lambda begun: LastDiffers(step["suffix"])
    if kind == "CTC":
        return lambda begun: NoRepeats(_library(step).decode)
    if kind == "Strip":
        return _each(lambda piece: _stripped(piece, step))
    decode = _library(step).decode
    if kind == "Replace":
        return _each(lambda piece: decode([piece]))
    # Metaspace and WordPiece: only whether it is the first piece matters.
    return _each(lambda piece: decode([piece]), lambda piece: decode(["", piece]))


def _of_text(step: dict[str, Any]) -> list[Factory]:
    """For the one long piece that came of all."""
    kind = step["type"]
    if kind == "Strip":
        return [lambda begun: StripText(step["content"], 0 if begun else step["start"], step["stop"])]
    if kind == "Replace" and step["pattern"].get("String"):
        return [lambda begun: ReplaceText(step["pattern"]["String"], step["content"])]
    if kind == "BPEDecoder":
        return [lambda begun: ReplaceText(step["suffix"], "")]
    if kind == "Metaspace":
        content = " " if step["prepend_scheme"] == "never" else ""
        return [lambda begun: ReplaceText(step["replacement"], content)]
    return [lambda begun: Whole(_library(step).decode)]  # nobody's model; right, but not streamed


def _library(step: dict[str, Any]) -> decoders.Decoder:
    """The library's own decoder for one step. Raises `UnsupportedModel`."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step["pattern"]
        regex = tokenizers.Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"]
        return decoders.Replace(regex, step["content"])
    if kind == "Metaspace":
        return decoders.Metaspace(step["replacement"], step["prepend_scheme"], step["split"])
    if kind == "WordPiece":
        return decoders.WordPiece(step["prefix"], step["cleanup"])
    if kind == "CTC":
        return decoders.CTC(step["pad_token"], step["word_delimiter_token"], step["cleanup"])
    simple = {"ByteFallback": decoders.ByteFallback, "ByteLevel": decoders.ByteLevel}
    if kind not in simple:
        raise UnsupportedModel(f"tokenizer.json: unknown decoder {kind!r:.40}", param="decoder")
    return simple[kind]()


def _stripped(piece: str, step: dict[str, Any]) -> str:
    strip = StripText(step["content"], step["start"], step["stop"])
    return "".join([*strip.feed(piece), *strip.end()])


def _each(first: Callable[[str], str], later: Callable[[str], str] | None = None) -> Factory:
    """Each piece by itself; the first of all perhaps in another way."""
    first = functools.lru_cache(CACHED)(first)
    later = functools.lru_cache(CACHED)(later) if later else first
    return lambda begun: Each(later if begun else first, later)


class Each:
    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        self._next, self._later = first, later

    def feed(self, piece: str) -> Sequence[str]:
        decoded = self._next(piece)
        self._next = self._later
        return (decoded,)

    def end(self) -> Sequence[str]:
        return ()


class Bytes:
    """Byte-level BPE: the bytes of an unfinished character are held, at most three."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: str) -> Sequence[str]:
        data = self._held + piece_bytes(piece)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return (text,)

    def end(self) -> Sequence[str]:
        held, self._held = self._held, b""
        return (held.decode("utf-8", "replace"),)


class ByteRuns:
    """A run of `<0xNN>` is text only if all of it is valid UTF-8, otherwise each byte is U+FFFD:
    it is held until it ends."""

    def __init__(self) -> None:
        self._run = b""

    def feed(self, piece: str) -> Sequence[str]:
        byte = fallback_byte(piece)
        if byte is not None:
            self._run += bytes([byte])
            return ()
        return (*self.end(), piece) if self._run else (piece,)

    def end(self) -> Sequence[str]:
        run, self._run = self._run, b""
        try:
            return (run.decode(),) if run else ()
        except UnicodeDecodeError:
            return (REPLACEMENT,) * len(run)

    def forget_whole_characters(self) -> None:
        """Keep the bytes of an unfinished character only, where what came before it is valid."""
        try:
            _, used = codecs.utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            return
        self._run = self._run[used:]


class LastDiffers:
    """BPE with a suffix at the end of words: a space, but nothing behind the last piece."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def feed(self, piece: str) -> Sequence[str]:
        held, self._held = self._held, piece
        return () if held is None else (held.replace(self._suffix, " "),)

    def end(self) -> Sequence[str]:
        held, self._held = self._held, None
        return () if held is None else (held.replace(self._suffix, ""),)


class NoRepeats:
    """CTC: of equal pieces in a row only the first counts."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._last: str | None = None

    def feed(self, piece: str) -> Sequence[str]:
        if piece == self._last:
            return ()
        self._last = piece
        decoded = self._decode([piece])
        return (decoded,) if decoded else ()

    def end(self) -> Sequence[str]:
        return ()


class ReplaceText:
    """Every occurrence of a string, wherever the parts of the text are cut."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content
        self._held = ""

    def feed(self, piece: str) -> Sequence[str]:
        *parts, rest = (self._held + piece).split(self._pattern)
        keep = min(len(self._pattern) - 1, len(rest))
        while not self._pattern.startswith(rest[len(rest) - keep :]):
            keep -= 1
        self._held = rest[len(rest) - keep :]
        return (self._content.join([*parts, rest[: len(rest) - keep]]),)

    def end(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (held,)


class StripText:
    """Up to `start` times `content` from the beginning and `stop` times from the end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def feed(self, piece: str) -> Sequence[str]:
        while self._start and piece:
            if piece[0] != self._content:
                self._start = 0
                break
            piece, self._start = piece[1:], self._start - 1
        text = self._held + piece
        keep = min(len(text) - len(text.rstrip(self._content)), self._stop)
        self._held = text[len(text) - keep :]
        return (text[: len(text) - keep],)

    def end(self) -> Sequence[str]:
        self._held = ""
        return ()


class Whole:
    """All of the text at its end."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._held = ""

    def feed(self, piece: str) -> Sequence[str]:
        self._held += piece
        return ()

    def end(self) -> Sequence[str]:
        held, self._held = self._held, ""
        return (self._decode([held]),) if held else ()
