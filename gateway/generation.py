"""From an open request's tokens to the text of its choices.

Owns: detokenizing, stop strings, and the count of tokens a client pays for, per choice. What
comes out depends on the tokens alone, never on how they arrived. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Collection

from gateway.detokenizer import Detokenizer
from gateway.dispatch import Dispatcher
from gateway.open_request import Update, Work
from gateway.schemas import TextOptions
from gateway.stop_strings import StopStrings
from gateway.streams import Token
from gateway.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class VisibleToken:
    """A token of the answer and where its text begins, in characters of the choice's text."""

    token: Token
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class TextDelta:
    """New text and tokens of one choice. `tokens` may be ahead of `text`, which is held back until
    characters are whole and no stop string can begin in it. `token_ids` are all that were generated:
    those of `tokens`, and the one that ended the choice."""

    choice: int
    text: str
    tokens: tuple[VisibleToken, ...]
    token_ids: tuple[int, ...]
    finish_reason: str | None
    accepted: int  # of `token_ids`, that had been drafted
    rejected: int  # drafted in vain, in the steps that end with one of `token_ids`


@dataclasses.dataclass(slots=True)
class Usage:
    """Token counts over all prompts and choices of one answer, updated while they run."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    accepted_tokens: int = 0  # of these, that had been drafted
    rejected_tokens: int = 0  # drafted in vain


class ChoiceText:
    """The text of one choice, token by token.

    `ending_ids` are the ids that end a choice: the last token is not part of the text when it is
    one of them and the node says "stop", unless the client wants to see what stopped. Text of the
    first `min_tokens` tokens is not searched.
    """

    def __init__(
        self, detokenizer: Detokenizer, options: TextOptions, ending_ids: Collection[int], min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._silent_ids = () if options.include_stop else ending_ids
        self._min_tokens = min_tokens
        self._offset = 0
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def push(self, update: Update) -> TextDelta:
        text: list[str] = []
        visible: list[VisibleToken] = []
        before = self.num_tokens
        last = len(update.tokens) - 1
        for index, token in enumerate(update.tokens):
            self.num_tokens += 1
            ends = index == last and update.finished == "stop"
            if ends and token.token_id in self._silent_ids:
                continue
            piece = self._detokenizer.push(token.token_id)
            visible.append(VisibleToken(token, self._offset))
            text.append(self._searched(piece))
            if self.finish_reason is not None:
                break
        if update.finished is not None and self.finish_reason is None:
            text.append(self._searched(self._detokenizer.finish()))
            text.append(self._stops.finish())
            self.finish_reason = self.finish_reason or update.finished
        new = update.tokens[: self.num_tokens - before]
        return TextDelta(
            update.choice,
            "".join(text),
            tuple(visible),
            tuple(token.token_id for token in new),
            self.finish_reason,
            sum(token.accepted for token in new),
            sum(token.rejected for token in new),
        )

    def _searched(self, piece: str) -> str:
        self._offset += len(piece)
        if self.num_tokens <= self._min_tokens:
            return piece
        certain = self._stops.push(piece)
        if self._stops.stopped is not None:
            self.finish_reason = "stop"
        return certain


async def generate(
    dispatcher: Dispatcher,
    tokenizer: Tokenizer,
    work: Work,
    options: TextOptions,
    usage: Usage,
    echoed: Detokenizer | None = None,
) -> AsyncGenerator[TextDelta, None]:
    """Run `work`; yields deltas of all choices as they come, empty ones left out.

    `echoed` is a detokenizer that has gone through the prompt, when the client gets the prompt's text
    too: what it still holds back comes with the text of each choice. Whoever starts this must close it
    (`contextlib.aclosing`), which cancels the request.
    """
    params = work.request.params
    ending_ids = frozenset((*tokenizer.model.stop_token_ids, *params.stop_token_ids))
    begin = echoed or tokenizer.detokenizer(
        work.request.token_ids, skip_special_tokens=options.skip_special_tokens
    )
    choices = [
        ChoiceText(begin.copy(), options, ending_ids, work.request.params.min_tokens) for _ in range(work.n)
    ]
    async with dispatcher.run(work) as request, contextlib.aclosing(request.updates()) as updates:
        cached_tokens = 0
        async for update in updates:
            choice = choices[update.choice]
            if choice.finish_reason is not None:
                continue
            delta = choice.push(update)
            usage.completion_tokens += len(delta.token_ids)
            usage.accepted_tokens += delta.accepted
            usage.rejected_tokens += delta.rejected
            usage.cached_tokens += request.cached_tokens - cached_tokens
            cached_tokens = request.cached_tokens
            if delta.finish_reason is not None:
                dispatcher.stop(request, update.choice)
            if delta.text or delta.token_ids or delta.finish_reason:
                yield delta
