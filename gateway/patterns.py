"""Regular expressions of tokenizers, and which of them may be matched on the event loop.

A pattern of a model's folder may backtrack for seconds over a few kilobytes. These were published with
families of models and take time in proportion to the text; a text for a tokenizer with any other one is
encoded in an intake process, which has its limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LINEAR = frozenset(
    {
        # GPT-2, which ByteLevel has of its own, spelled out
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Qwen 2, 2.5 and 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
        # Llama 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
        # parts of DeepSeek's and SmolLM's, which split digits first
        r"\p{N}",
        r"\p{N}{1,3}",
        r"[0-9]",
        r"\d",
        r"\s",
        " ",
    }
)


def regexes(pipeline: dict[str, Any]) -> Iterator[str]:
    """Those that a text meets on its way to token ids, by the parts of a tokenizer.json."""
    for part, name in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        for step in steps(pipeline[part], name):
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and "Regex" in pattern:
                yield pattern["Regex"]


def may_backtrack(pipeline: dict[str, Any]) -> bool:
    """Whether nobody knows how long it takes to encode a short text."""
    return any(pattern not in LINEAR for pattern in regexes(pipeline))


def steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a sequence, the part itself where it is none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[name] for step in steps(each, name)]
