"""`POST /v1/completions`: prompts in four forms, answered at once or as a stream of chunks.

Owns: OpenAI's shapes of a completion, its logprobs and its usage. Each prompt is a request of its
own inside; choice `c` of prompt `p` has the index `p * n + c`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from gateway.generation import TextDelta, Usage, VisibleToken, generate
from gateway.open_request import Work
from gateway.schemas import CompletionBody, parse
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import Answer, EventStream, JSONAnswer
from gateway.tokenizer import Tokenizer

MINUS_INFINITY = -9999.0  # how OpenAI writes it: JSON has no infinity


@dataclasses.dataclass(slots=True)
class _Run:
    """One request's way through this endpoint."""

    service: Service
    model: ServedModel
    body: CompletionBody
    works: list[Work]
    echoes: list[str]  # per prompt, "" without echo
    stops: tuple[str, ...]
    head: dict[str, Any]


async def completions(service: Service, request: Request) -> Answer:
    body = parse(CompletionBody, await service.read(request))
    model = service.models.find(body.model)
    body.check(service.limits.max_n)
    stops = body.stops()
    request_id = service.new_id("cmpl")
    prompts = await service.completion_prompts(model, body)
    works = [
        service.work(
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            model, prompt_ids, "prompt", body, body.sampling, request,
        )
        for index, prompt_ids in enumerate(prompts)
    ]  # fmt: skip
    head = {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    run = _Run(service, model, body, works, _echoes(model.tokenizer, body, prompts), stops, head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


def _echoes(tokenizer: Tokenizer, body: CompletionBody, prompts: list[list[int]]) -> list[str]:
    if not body.echo:
        return [""] * len(prompts)
    given = [body.prompt] if not isinstance(body.prompt, list) else body.prompt
    return [
        given[index] if isinstance(given[index], str) else tokenizer.decode(prompt_ids)
        for index, prompt_ids in enumerate(prompts)
    ]


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    usage = Usage()
    empty_usage = {"usage": None} if run.body.include_usage else {}
    echo_due = [bool(run.body.echo)] * (len(run.works) * run.body.n)
    async with aclosing(
        merged(run.service, run.model.tokenizer, run.works, run.stops, usage)
    ) as deltas:
        async for prompt, delta in deltas:
            index = prompt * run.body.n + delta.choice
            text, echo = delta.text, run.echoes[prompt]
            if echo_due[index]:
                text, echo_due[index] = echo + text, False
            by_token = run.body.logprobs is not None or run.body.return_token_ids
            if not (text or delta.finish_reason or by_token):
                continue
            logprobs = _logprobs(run, delta.tokens, len(echo))
            choice = _choice(index, text, logprobs, delta.finish_reason)
            if run.body.return_token_ids:
                choice["token_ids"] = [visible.token.token_id for visible in delta.tokens]
            yield {**run.head, "choices": [choice], **empty_usage}
    if run.body.include_usage:
        yield {**run.head, "choices": [], "usage": usage_body(usage)}


async def _whole(run: _Run) -> object:
    usage = Usage()
    count = len(run.works) * run.body.n
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[VisibleToken]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    async with aclosing(
        merged(run.service, run.model.tokenizer, run.works, run.stops, usage)
    ) as deltas:
        async for prompt, delta in deltas:
            index = prompt * run.body.n + delta.choice
            texts[index].append(delta.text)
            tokens[index] += delta.tokens
            reasons[index] = delta.finish_reason
    choices = []
    for index in range(count):
        echo = run.echoes[index // run.body.n]
        logprobs = _logprobs(run, tokens[index], len(echo))
        choice = _choice(index, echo + "".join(texts[index]), logprobs, reasons[index])
        if run.body.return_token_ids:
            choice["token_ids"] = [visible.token.token_id for visible in tokens[index]]
        choices.append(choice)
    return {**run.head, "choices": choices, "usage": usage_body(usage)}


async def merged(
    service: Service,
    tokenizer: Tokenizer,
    works: Sequence[Work],
    stops: Sequence[str],
    usage: Usage,
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Deltas of several requests as they come, each with the index of its request.

    The first failure ends all of them.
    """
    if len(works) == 1:
        one = generate(service.dispatcher, tokenizer, works[0], stops, usage)
        async with aclosing(one) as deltas:
            async for delta in deltas:
                yield 0, delta
        return

    service.dispatcher.check_room(len(works))
    queue: asyncio.Queue[tuple[int, TextDelta] | None] = asyncio.Queue()

    async def feed(index: int, work: Work) -> None:
        own = Usage()
        deltas = generate(service.dispatcher, tokenizer, work, stops, own)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        finally:
            usage.add(own)
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


def finite(logprob: float) -> float:
    return max(logprob, MINUS_INFINITY)


def _logprobs(run: _Run, tokens: Sequence[VisibleToken], base: int) -> object:
    """OpenAI's four parallel lists; the chosen token is among the alternatives too."""
    if run.body.logprobs is None:
        return None
    text_of = run.model.tokenizer.token_text
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
