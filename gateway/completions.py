"""`POST /v1/completions`: prompts in four forms, answered at once or as a stream of chunks.

Owns: OpenAI's shapes of a completion, its logprobs and its usage. Each prompt is a request of its
own inside; choice `c` of prompt `p` has the index `p * n + c`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from gateway.detokenizer import Detokenizer
from gateway.generation import TextDelta, Usage, VisibleToken, generate
from gateway.open_request import Work
from gateway.schemas import Body, CompletionBody, StreamOptions, TextOptions
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import Answer, EventStream, JSONAnswer
from gateway.tokenizer import Tokenizer

LONG_PROMPT = 4096  # tokens whose text is not made on the event loop
MINUS_INFINITY = -9999.0  # how OpenAI writes it: JSON has no infinity


@dataclasses.dataclass(frozen=True, slots=True)
class _Echo:
    """The prompt's text, which comes before the completion's, and the stream that goes on there."""

    text: str = ""
    stream: Detokenizer | None = None


@dataclasses.dataclass(slots=True)
class _Run:
    """One request's way through this endpoint."""

    service: Service
    model: ServedModel
    body: CompletionBody
    works: list[Work]
    echoes: list[_Echo]  # per prompt
    text: TextOptions
    head: dict[str, Any]

    def usage(self) -> Usage:
        return Usage(prompt_tokens=sum(len(work.prompt_ids) for work in self.works))


async def completions(service: Service, request: Request) -> Answer:
    body = await service.body(CompletionBody, request)
    model = service.models.find(body.model)
    body.check(service.limits.max_n)
    text = body.text_options()
    request_id = service.new_id("cmpl")
    prompts = await service.completion_prompts(model, body)
    works = [
        service.work(
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            model, prompt_ids, "prompt", body, request,
        )
        for index, prompt_ids in enumerate(prompts)
    ]  # fmt: skip
    head = {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    several = isinstance(body.prompt, list) and len(prompts) == len(body.prompt)
    given = body.prompt if several else [body.prompt]
    echoes = [
        await _echo(model.tokenizer, body, text, prompt, work)
        for prompt, work in zip(given, works, strict=True)
    ]
    run = _Run(service, model, body, works, echoes, text, head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


async def _echo(
    tokenizer: Tokenizer, body: CompletionBody, options: TextOptions, given: object, work: Work
) -> _Echo:
    """A text as it was given; ids as their text, up to what the first new token may change."""
    if not body.echo:
        return _Echo()
    if isinstance(given, str) and body.truncate_prompt_tokens is None:
        return _Echo(given)
    stream = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
    if len(work.prompt_ids) < LONG_PROMPT:
        return _Echo(stream.push_all(work.prompt_ids), stream)
    return _Echo(await asyncio.to_thread(stream.push_all, work.prompt_ids), stream)


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    body, usage = run.body, run.usage()
    begun = [False] * (len(run.works) * body.n)
    async with aclosing(merged(run, usage)) as deltas:
        async for prompt, delta in deltas:
            index = prompt * body.n + delta.choice
            first, begun[index] = not begun[index], True
            echo = run.echoes[prompt].text
            text = echo + delta.text if first else delta.text
            by_token = body.logprobs is not None or body.return_token_ids
            if not (text or delta.finish_reason or by_token):
                continue
            logprobs = _logprobs(run, delta.tokens, len(echo))
            choice = _choice(index, text, logprobs, delta.finish_reason)
            if body.return_token_ids:
                choice["token_ids"] = delta.token_ids
                choice["prompt_token_ids"] = run.works[prompt].prompt_ids if first else None
            yield {**run.head, "choices": [choice], **usage_of_chunk(body.stream_options, usage)}
    if body.stream_options.include_usage:
        yield {**run.head, "choices": [], "usage": usage_body(usage)}


async def _whole(run: _Run) -> object:
    body, usage = run.body, run.usage()
    count = len(run.works) * body.n
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[VisibleToken]] = [[] for _ in range(count)]
    token_ids: list[list[int]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    async with aclosing(merged(run, usage)) as deltas:
        async for prompt, delta in deltas:
            index = prompt * body.n + delta.choice
            texts[index].append(delta.text)
            tokens[index] += delta.tokens
            token_ids[index] += delta.token_ids
            reasons[index] = delta.finish_reason
    choices = []
    for index in range(count):
        prompt = index // body.n
        echo = run.echoes[prompt].text
        logprobs = _logprobs(run, tokens[index], len(echo))
        choice = _choice(index, echo + "".join(texts[index]), logprobs, reasons[index])
        if body.return_token_ids:
            choice["token_ids"] = token_ids[index]
            choice["prompt_token_ids"] = run.works[prompt].prompt_ids
        choices.append(choice)
    return {**run.head, "choices": choices, "usage": usage_body(usage)}


async def merged(run: _Run, usage: Usage) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Deltas of several requests as they come, each with the index of its request.

    The first failure ends all of them.
    """
    dispatcher, tokenizer, works = run.service.dispatcher, run.model.tokenizer, run.works
    if len(works) == 1:
        one = generate(dispatcher, tokenizer, works[0], run.text, usage, run.echoes[0].stream)
        async with aclosing(one) as deltas:
            async for delta in deltas:
                yield 0, delta
        return

    dispatcher.check_room(len(works))
    queue: asyncio.Queue[tuple[int, TextDelta] | None] = asyncio.Queue()

    async def feed(index: int, work: Work) -> None:
        echoed = run.echoes[index].stream
        deltas = generate(dispatcher, tokenizer, work, run.text, usage, echoed)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(feed(index, work)) for index, work in enumerate(works)]
    try:
        for _ in works:
            while (item := await queue.get()) is not None:
                yield item
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _choice(index: int, text: str, logprobs: object, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def usage_of_chunk(options: StreamOptions, usage: Usage) -> dict[str, Any]:
    """What a chunk says of usage: what was counted so far, or null, or nothing."""
    if options.continuous_usage_stats:
        return {"usage": usage_body(usage)}
    return {"usage": None} if options.include_usage else {}


def token_name(tokenizer: Tokenizer, body: Body, token_id: int) -> str:
    """How a token is written among logprobs."""
    if body.return_tokens_as_token_ids:
        return f"token_id:{token_id}"
    return tokenizer.token_text(token_id)


def finite(logprob: float) -> float:
    return max(logprob, MINUS_INFINITY)


def _logprobs(run: _Run, tokens: Sequence[VisibleToken], base: int) -> object:
    """OpenAI's four parallel lists; the chosen token is among the alternatives too."""
    if run.body.logprobs is None:
        return None
    text_of = functools.partial(token_name, run.model.tokenizer, run.body)
    known = [(visible, visible.token.logprobs) for visible in tokens]
    tops: list[dict[str, float] | None] = []
    for visible, logprobs in known:
        if logprobs is None or not run.body.logprobs:
            tops.append(None)
            continue
        top = {
            text_of(token_id): finite(value)
            for token_id, value in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        }
        top.setdefault(text_of(visible.token.token_id), finite(logprobs.logprob))
        tops.append(top)
    return {
        "tokens": [text_of(visible.token.token_id) for visible in tokens],
        "token_logprobs": [finite(lp.logprob) if lp is not None else None for _, lp in known],
        "top_logprobs": tops,
        "text_offset": [base + visible.offset for visible in tokens],
    }
