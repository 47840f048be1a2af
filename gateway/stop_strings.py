"""Stop strings in a stream of text, wherever the pieces of the stream are cut.

Owns: finding the first stop string that is complete, reading character by character, and holding
back exactly the text that could still be the beginning of one. The result depends on the text
alone, never on how it was cut into pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence


class _Pattern:
    """Knuth-Morris-Pratt's table of one stop string: immutable, made once for many choices."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._failure = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._failure[length - 1]
            if text[index] == text[length]:
                length += 1
            self._failure[index] = length

    def feed(self, matched: int, character: str) -> int:
        """Characters of `text` that end at `character`, after `matched` ended before it."""
        while matched and self.text[matched] != character:
            matched = self._failure[matched - 1]
        return matched + 1 if self.text[matched] == character else matched


@functools.lru_cache(maxsize=64)
def _pattern(text: str) -> _Pattern:
    return _Pattern(text)


class StopStrings:
    """Feed text with `push`; `stopped` is the stop string that was met, after which all is cut.

    The stop string itself is cut too, unless `include` is set.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._patterns = [_pattern(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each that end at the last one read
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.stopped is not None:
            return ""
        if not self._patterns:
            return text
        base = len(self._held)
        text = self._held + text
        for index in range(base, len(text)):
            met = ""
            for which, pattern in enumerate(self._patterns):
                matched = pattern.feed(self._matched[which], text[index])
                self._matched[which] = matched
                if matched == len(pattern.text) and matched > len(met):
                    met = pattern.text
            if met:
                self.stopped, self._held = met, ""
                return text[: index + 1 - (0 if self._include else len(met))]
        keep = max(self._matched)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no stop string came after all."""
        held, self._held = self._held, ""
        return held
