"""`POST /v1/chat/completions`: messages through the model's template, answered in one or in chunks.

Owns: OpenAI's shapes of a chat completion and of its logprobs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from gateway.completions import finite, token_name, usage_body, usage_of_chunk, whole
from gateway.generation import TextDelta, Usage, VisibleToken, generate
from gateway.json_text import JSONList, with_members
from gateway.open_request import Work
from gateway.schemas import ChatBody, TextOptions, parse
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
    prepared = await service.prepared("chat", request)
    body = parse(ChatBody, prepared.fields)
    model = service.models.find(body.model)
    request_id = service.new_id("chatcmpl")
    (prompt_ids,) = prepared.prompts
    work = service.work(request_id, model, prompt_ids, "messages", body, request, prepared.prediction)
    head = {
        "id": request_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    run = _Run(service, model, body, work, body.text_options(), head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    """For each choice: a chunk with the role, chunks with content, one with the reason it ended."""
    body, usage = run.body, Usage(len(run.work.request.token_ids))

    def chunk(
        index: int,
        delta: dict[str, Any],
        logprobs: object = None,
        reason: str | None = None,
        token_ids: Sequence[int] = (),
        **more: object,
    ) -> object:
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


async def _whole(run: _Run) -> Sequence[bytes]:
    body, usage = run.body, Usage(len(run.work.request.token_ids))
    choices = [_ChoiceSoFar() for _ in range(body.n)]
    running = generate(run.service.dispatcher, run.model.tokenizer, run.work, run.text, usage)
    async with aclosing(running) as deltas:
        async for delta in deltas:
            choices[delta.choice].add(delta, _logprobs(run, delta.tokens))
    written = (choice.json(index, body) for index, choice in enumerate(choices))
    return await whole({**run.head, **_prompt_ids(run)}, written, usage)


class _ChoiceSoFar:
    """One choice of an answer that is given at once. Its lists are kept as JSON text."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._logprobs: JSONList | None = None
        self._token_ids = JSONList()
        self._reason: str | None = None

    def add(self, delta: TextDelta, logprobs: Mapping[str, Any] | None) -> None:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._reason = delta.finish_reason
        if logprobs is not None:
            self._logprobs = self._logprobs or JSONList()
            self._logprobs.extend(logprobs["content"])

    def json(self, index: int, body: ChatBody) -> bytes:
        message = {"role": "assistant", "content": "".join(self._text), "refusal": None}
        small: dict[str, Any] = {"index": index, "message": message, "finish_reason": self._reason}
        members = {}
        if self._logprobs is None:
            small["logprobs"] = None
        else:
            members["logprobs"] = with_members({"refusal": None}, {"content": self._logprobs.text})
        if body.return_token_ids:
            members["token_ids"] = self._token_ids.text
        return with_members(small, members)


def _prompt_ids(run: _Run) -> dict[str, Any]:
    return {"prompt_token_ids": run.work.request.token_ids} if run.body.return_token_ids else {}


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
