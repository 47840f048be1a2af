"""Stop strings in a stream of text, wherever the pieces of the stream are cut.

Owns: finding the first stop string that is complete, reading character by character, and holding
back exactly the text that could still be the beginning of one. The result depends on the text
alone, never on how it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """Knuth-Morris-Pratt: `matched` characters of `text` end at the last character fed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._failure = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._failure[length - 1]
            if text[index] == text[length]:
                length += 1
            self._failure[index] = length

    def feed(self, character: str) -> bool:
        while self.matched and self.text[self.matched] != character:
            self.matched = self._failure[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.text)


class StopStrings:
    """Feed text with `push`; `stopped` is the stop string that was met, after which all is cut.

    The stop string itself is cut too, unless `include` is set.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._patterns = [_Pattern(stop) for stop in stops]
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
            met = [p for p in self._patterns if p.feed(text[index])]
            if met:
                longest = max(met, key=lambda pattern: len(pattern.text))
                self.stopped, self._held = longest.text, ""
                return text[: index + 1 - (0 if self._include else len(longest.text))]
        keep = max(pattern.matched for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no stop string came after all."""
        held, self._held = self._held, ""
        return held
