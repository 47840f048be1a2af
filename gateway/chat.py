"""`POST /v1/chat/completions`: messages through the model's template, answered in one or in chunks.

Owns: OpenAI's shapes of a chat completion and of its logprobs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from gateway.completions import finite, usage_body
from gateway.generation import Usage, VisibleToken, generate
from gateway.open_request import Work
from gateway.schemas import ChatBody, parse
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import Answer, EventStream, JSONAnswer
from gateway.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class _Run:
    """One request's way through this endpoint."""

    service: Service
    model: ServedModel
    body: ChatBody
    work: Work
    stops: tuple[str, ...]
    head: dict[str, Any]


async def chat_completions(service: Service, request: Request) -> Answer:
    body = parse(ChatBody, await service.read(request))
    model = service.models.find(body.model)
    body.check(service.limits.max_n)
    stops = body.stops()
    request_id = service.new_id("chatcmpl")
    prompt_ids = await service.chat_prompt(model, body)
    work = service.work(request_id, model, prompt_ids, "messages", body, body.sampling, request)
    head = {
        "id": request_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    run = _Run(service, model, body, work, stops, head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    """For each choice: a chunk with the role, chunks with content, one with the reason it ended."""
    usage = Usage()
    empty_usage = {"usage": None} if run.body.include_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: object, reason: str | None,
        token_ids: Sequence[int] = (),
    ) -> object:  # fmt: skip
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if run.body.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return {**run.head, "choices": [choice], **empty_usage}

    role_due = [True] * run.body.n
    running = generate(run.service.dispatcher, run.model.tokenizer, run.work, run.stops, usage)
    async with aclosing(running) as deltas:
        async for delta in deltas:
            if role_due[delta.choice]:
                role_due[delta.choice] = False
                yield chunk(delta.choice, {"role": "assistant", "content": ""}, None, None)
            logprobs = _logprobs(run, delta.tokens)
            if delta.text or logprobs is not None or (delta.tokens and run.body.return_token_ids):
                ids = [token.token.token_id for token in delta.tokens]
                yield chunk(delta.choice, {"content": delta.text}, logprobs, None, ids)
            if delta.finish_reason is not None:
                yield chunk(delta.choice, {}, None, delta.finish_reason)
    if run.body.include_usage:
        yield {**run.head, "choices": [], "usage": usage_body(usage)}


async def _whole(run: _Run) -> object:
    usage = Usage()
    texts: list[list[str]] = [[] for _ in range(run.body.n)]
    tokens: list[list[VisibleToken]] = [[] for _ in range(run.body.n)]
    reasons: list[str | None] = [None] * run.body.n
    running = generate(run.service.dispatcher, run.model.tokenizer, run.work, run.stops, usage)
    async with aclosing(running) as deltas:
        async for delta in deltas:
            texts[delta.choice].append(delta.text)
            tokens[delta.choice] += delta.tokens
            reasons[delta.choice] = delta.finish_reason
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(texts[index])},
            "logprobs": _logprobs(run, tokens[index]),
            "finish_reason": reasons[index],
        }
        for index in range(run.body.n)
    ]
    if run.body.return_token_ids:
        for choice, visible in zip(choices, tokens, strict=True):
            choice["token_ids"] = [token.token.token_id for token in visible]
    return {**run.head, "choices": choices, "usage": usage_body(usage)}


def _logprobs(run: _Run, tokens: Sequence[VisibleToken]) -> dict[str, Any] | None:
    if not run.body.logprobs or not tokens:
        return None
    tokenizer = run.model.tokenizer
    content = []
    for visible in tokens:
        known = visible.token.logprobs
        entry = _entry(tokenizer, visible.token.token_id, known.logprob if known else 0.0)
        entry["top_logprobs"] = [
            _entry(tokenizer, token_id, value)
            for token_id, value in zip(
                known.top_ids if known else (), known.top_logprobs if known else (), strict=True
            )
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
