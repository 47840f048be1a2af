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

from gateway.completions import finite, token_name, usage_body, usage_of_chunk
from gateway.generation import Usage, VisibleToken, generate
from gateway.open_request import Work
from gateway.schemas import ChatBody, TextOptions
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import Answer, EventStream, JSONAnswer


@dataclasses.dataclass(slots=True)
class _Run:
    """One request's way through this endpoint."""

    service: Service
    model: ServedModel
    body: ChatBody
    work: Work
    text: TextOptions
    head: dict[str, Any]


async def chat_completions(service: Service, request: Request) -> Answer:
    body = await service.body(ChatBody, request)
    model = service.models.find(body.model)
    body.check(service.limits.max_n)
    text = body.text_options()
    request_id = service.new_id("chatcmpl")
    prompt_ids = await service.chat_prompt(model, body)
    work = service.work(request_id, model, prompt_ids, "messages", body, request)
    head = {
        "id": request_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    run = _Run(service, model, body, work, text, head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    """For each choice: a chunk with the role, chunks with content, one with the reason it ended."""
    body, usage = run.body, Usage(len(run.work.prompt_ids))

    def chunk(
        index: int, delta: dict[str, Any], logprobs: object = None, reason: str | None = None,
        token_ids: Sequence[int] = (), **more: object,
    ) -> object:  # fmt: skip
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if body.return_token_ids:
            choice["token_ids"] = token_ids
        counted = usage_of_chunk(body.stream_options, usage)
        return {**run.head, "choices": [choice], **counted, **more}

    role_due = [True] * body.n
    running = generate(run.service.dispatcher, run.model.tokenizer, run.work, run.text, usage)
    async with aclosing(running) as deltas:
        async for delta in deltas:
            if role_due[delta.choice]:
                role_due[delta.choice] = False
                yield chunk(delta.choice, {"role": "assistant", "content": ""}, **_prompt_ids(run))
            logprobs = _logprobs(run, delta.tokens)
            if delta.text or logprobs is not None or body.return_token_ids:
                content = {"content": delta.text}
                yield chunk(delta.choice, content, logprobs, None, delta.token_ids)
            if delta.finish_reason is not None:
                yield chunk(delta.choice, {}, reason=delta.finish_reason)
    if body.stream_options.include_usage:
        yield {**run.head, "choices": [], "usage": usage_body(usage)}


async def _whole(run: _Run) -> object:
    body, usage = run.body, Usage(len(run.work.prompt_ids))
    texts: list[list[str]] = [[] for _ in range(body.n)]
    tokens: list[list[VisibleToken]] = [[] for _ in range(body.n)]
    token_ids: list[list[int]] = [[] for _ in range(body.n)]
    reasons: list[str | None] = [None] * body.n
    running = generate(run.service.dispatcher, run.model.tokenizer, run.work, run.text, usage)
    async with aclosing(running) as deltas:
        async for delta in deltas:
            texts[delta.choice].append(delta.text)
            tokens[delta.choice] += delta.tokens
            token_ids[delta.choice] += delta.token_ids
            reasons[delta.choice] = delta.finish_reason
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
            "logprobs": _logprobs(run, tokens[index]),
            "finish_reason": reasons[index],
        }
        for index in range(body.n)
    ]
    if body.return_token_ids:
        for choice, ids in zip(choices, token_ids, strict=True):
            choice["token_ids"] = ids
    return {**run.head, "choices": choices, "usage": usage_body(usage), **_prompt_ids(run)}


def _prompt_ids(run: _Run) -> dict[str, Any]:
    return {"prompt_token_ids": run.work.prompt_ids} if run.body.return_token_ids else {}


def _logprobs(run: _Run, tokens: Sequence[VisibleToken]) -> dict[str, Any] | None:
    if not run.body.logprobs or not tokens:
        return None
    content = []
    for visible in tokens:
        known = visible.token.logprobs
        entry = _entry(run, visible.token.token_id, known.logprob if known else 0.0)
        entry["top_logprobs"] = [
            _entry(run, token_id, value)
            for token_id, value in zip(
                known.top_ids if known else (), known.top_logprobs if known else (), strict=True
            )
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(run: _Run, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_name(run.model.tokenizer, run.body, token_id),
        "logprob": finite(logprob),
        "bytes": list(run.model.tokenizer.token_bytes(token_id)),
    }
