"""N-gram lookup: what followed the last tokens when they, or as many of them as possible, came before.

Owns an index for each sequence: of its prompt and reply, and of the text that its client predicts. Tokens go
into it once, and a lookup costs the same however long the text is: nothing is scanned. Known as prompt
lookup (Saxena 2023) and LLMA (Yang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence


SIZES = (16, 8, 4, 2)  # of the n-grams that are looked up, the longest first
AT_ONCE = 4096  # tokens put into indexes before a step, of all sequences: long prompts take several steps
AT_LEAST = 64  # of one sequence: more than a step gives it

_FACTOR = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class NGramIndex:
    """Of one growing text: where each n-gram ended last."""

    def __init__(self) -> None:
        self._ends: dict[int, dict[int, int]] = {size: {} for size in SIZES}  # by size and hash
        self._indexed = 0  # leading tokens whose n-grams are in it

    def add(self, tokens: AnySequence[int], end: int, most: int = AT_ONCE) -> None:
        """Index the n-grams of `tokens[:end]`, or of the next `most` tokens that are not indexed yet."""
        start, end = self._indexed, min(end, self._indexed + most)
        if end <= start:
            return
        for size, ends in self._ends.items():
            first = max(start + 1, size)  # the end of the first n-gram that is new
            if first > end:
                continue
            if end == first:
                ends[_hash(tokens, end - size, end)] = end
            else:
                hashes = _hashes(tokens[first - size : end], size)
                ends.update(zip(hashes, range(first, end + 1), strict=True))
        self._indexed = end

    def follow(self, indexed: AnySequence[int], tokens: AnySequence[int]) -> int | None:
        """Where in the `indexed` text that goes on which follows the longest n-gram that `tokens` end
        with; None if it has none of them."""
        length = len(tokens)
        for size, ends in self._ends.items():
            if size > length:
                continue
            end = ends.get(_hash(tokens, length - size, length))
            if end is not None and indexed[end - size : end] == tokens[length - size :]:
                return end
        return None


class NGramSource:
    """Implements `DraftSource`."""

    name = "ngram"
    by_model = False
    prior = 0.5  # of a token that follows an n-gram, how often it is right

    def __init__(self) -> None:
        self._texts: dict[int, NGramIndex] = {}  # by sequence id
        self._predictions: dict[int, NGramIndex] = {}

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        tokens, prediction = sequence.token_ids, sequence.prediction
        text = self._texts.setdefault(sequence.sequence_id, NGramIndex())
        share = max(AT_LEAST, AT_ONCE // (len(self._texts) + len(self._predictions)))
        text.add(tokens, len(tokens) - 1, share)  # what the text ends with has no continuation yet
        if prediction:
            index = self._predictions.setdefault(sequence.sequence_id, NGramIndex())
            index.add(prediction, len(prediction) - 1, share)
            reply = tokens[sequence.prompt_len :]
            at = index.follow(prediction, reply)
            if len(reply) < SIZES[-1] and reply == prediction[: len(reply)]:  # too short to be looked up
                at = len(reply)
            if at is not None and at < len(prediction):
                return prediction[at : at + count]
        at = text.follow(tokens, tokens)
        if at is None:
            return []
        period = len(tokens) - at  # what comes after the end is taken to repeat
        return [tokens[at + index % period] for index in range(count)]

    def ended(self, sequence: Sequence) -> None:
        self._texts.pop(sequence.sequence_id, None)
        self._predictions.pop(sequence.sequence_id, None)


def _hash(tokens: AnySequence[int], start: int, end: int) -> int:
    value = 0
    for index in range(start, end):
        value = (value * _FACTOR + tokens[index] + 1) & _MASK
    return value


def _hashes(tokens: AnySequence[int], size: int) -> list[int]:
    """Of every n-gram of this size, in order; as `_hash`."""
    numbers = np.array(tokens, np.uint64) + np.uint64(1)
    count = len(numbers) - size + 1
    values = np.zeros(count, np.uint64)
    for offset in range(size):
        values = values * np.uint64(_FACTOR) + numbers[offset : offset + count]
    found: list[int] = values.tolist()
    return found
