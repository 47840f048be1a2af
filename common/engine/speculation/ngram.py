"""N-gram lookup: what followed the last tokens when they, or as many of them as possible, came before.

Owns the indexes: one of each prompt and of what its client predicts, for all choices of a request, and one of
each reply. Tokens go into them once, and nothing is scanned. Known as prompt lookup (Saxena 2023) and LLMA
(Yang et al. 2023).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from common.engine.speculation.ngram_index import SIZES, NGramIndex

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence

AT_ONCE = 4096  # tokens put into indexes before a step, of all sequences: long prompts take several steps
AT_LEAST = 64  # of one sequence: more than a step gives it
MOST_BYTES = 2**27  # in all indexes: of 2.5 million tokens


@dataclasses.dataclass(slots=True)
class _Shared:
    """What all choices of a request have."""

    key: tuple[str, int]  # the request, and the length of its prompt
    prompt: NGramIndex
    prediction: NGramIndex
    users: set[int] = dataclasses.field(default_factory=set)  # sequence ids


@dataclasses.dataclass(slots=True)
class _Text:
    """A sequence's: `reply` has the n-grams that end after its prompt."""

    shared: _Shared
    reply: NGramIndex
    used: int = 0  # when, in drafts of all sequences


class NGramSource:
    """Implements `DraftSource`. When the indexes take `most_bytes`, those of sequences that have not been
    drafted for lately make way, and if there are none, what comes is not indexed."""

    name = "ngram"
    by_model = False
    prior = 0.5  # of a token that follows an n-gram, how often it is right

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self._shared: dict[tuple[str, int], _Shared] = {}
        self._texts: dict[int, _Text] = {}  # by sequence id, the one used last at the end
        self._drafts = 0

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        tokens, prediction = sequence.token_ids, sequence.prediction
        text = self._text_of(sequence)
        self._index(sequence, text)
        known = text.reply.newest(tokens, len(tokens))
        at = _in_prediction(sequence, text, known)
        if at is not None:
            return prediction[at : at + count]
        at = _in_text(tokens, text, known)
        if at is None:
            return []
        period = len(tokens) - at  # what comes after the end is taken to repeat
        return [tokens[at + index % period] for index in range(count)]

    def ended(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self._texts:
            self._forget(sequence.sequence_id)

    def _text_of(self, sequence: Sequence) -> _Text:
        name, begin = sequence.sequence_id, sequence.prompt_len
        text = self._texts.pop(name, None)
        if text is None:
            key = (sequence.request_id, begin)
            shared = self._shared.get(key)
            if shared is None:
                shared = self._shared[key] = _Shared(key, NGramIndex(), NGramIndex())
                self.num_bytes += shared.prompt.num_bytes + shared.prediction.num_bytes
            shared.users.add(name)
            text = _Text(shared, NGramIndex(begin))
            self.num_bytes += text.reply.num_bytes
        self._texts[name] = text
        self._drafts += 1
        text.used = self._drafts
        return text

    def _index(self, sequence: Sequence, text: _Text) -> None:
        """Up to the token before the last: what the text ends with has no continuation yet."""
        if self.num_bytes >= self.most_bytes and not self._make_way():
            return
        tokens, prediction, shared = sequence.token_ids, sequence.prediction, text.shared
        share = max(AT_LEAST, AT_ONCE // (2 * len(self._texts)))
        for index, known, end in (
            (shared.prompt, tokens, min(sequence.prompt_len, len(tokens) - 1)),
            (text.reply, tokens, len(tokens) - 1),
            (shared.prediction, prediction, len(prediction) - 1),
        ):
            if index.indexed < end:
                before = index.num_bytes
                index.add(known, min(end, index.indexed + share), expected=end)
                self.num_bytes += index.num_bytes - before

    def _make_way(self) -> bool:
        """Forget the text that was used longest ago, unless all are in use."""
        name, text = next(iter(self._texts.items()))
        if text.used > self._drafts - 2 * len(self._texts):
            return False
        self._forget(name)
        return True

    def _forget(self, name: int) -> None:
        text = self._texts.pop(name)
        self.num_bytes -= text.reply.num_bytes
        text.shared.users.discard(name)
        if not text.shared.users:
            self.num_bytes -= text.shared.prompt.num_bytes + text.shared.prediction.num_bytes
            del self._shared[text.shared.key]


def _in_prediction(sequence: Sequence, text: _Text, known: list[int]) -> int | None:
    """Where in the prediction that goes on which follows the longest n-gram that the reply ends with."""
    tokens, prediction, generated = sequence.token_ids, sequence.prediction, sequence.num_generated
    if not prediction:
        return None
    if generated < SIZES[0]:  # too short to be looked up: whether it is the prediction's beginning
        begins = generated < len(prediction) and tokens[sequence.prompt_len :] == prediction[:generated]
        return generated if begins else None
    for size, tag in reversed([pair for pair in zip(SIZES, known, strict=False) if pair[0] <= generated]):
        end = text.shared.prediction.find(tag)
        if end and prediction[end - size : end] == tokens[-size:]:
            return end
    return None


def _in_text(tokens: list[int], text: _Text, known: list[int]) -> int | None:
    """Where in the text that goes on which followed the longest n-gram that it ends with, the last time."""
    for size, tag in reversed(list(zip(SIZES, known, strict=False))):
        for index in (text.reply, text.shared.prompt):
            end = index.find(tag)
            if end and tokens[end - size : end] == tokens[-size:]:
                return end
    return None
