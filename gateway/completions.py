"""`POST /v1/completions`: prompts in four forms, answered at once or as a stream of chunks.

Owns: OpenAI's shapes of a completion, its logprobs and its usage. Each prompt is a request of its
own inside; choice `c` of prompt `p` has the index `p * n + c`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from gateway.detokenizer import Detokenizer
from gateway.generation import TextDelta, Usage, VisibleToken, generate
from gateway.json_text import JSONList, dumps, joined, with_members
from gateway.open_request import Work
from gateway.schemas import Body, CompletionBody, StreamOptions, TextOptions, parse
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import Answer, EventStream, JSONAnswer
from gateway.tokenizer import Tokenizer

LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
MAX_AHEAD = 256  # deltas of several prompts that wait for a client to take them
IN_ONE_GO = 1024  # tokens of a prompt whose text is made before others have their turn
MINUS_INFINITY = -9999.0  # how OpenAI writes it: JSON has no infinity


@dataclasses.dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt's text as JSON, before the completion's, and the detokenizer that goes on there."""

    text: bytes = b""
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
        return Usage(prompt_tokens=sum(len(work.request.token_ids) for work in self.works))


async def completions(service: Service, request: Request) -> Answer:
    prepared = await service.prepared("completions", request)
    body = parse(CompletionBody, prepared.fields)
    model = service.models.find(body.model)
    request_id = service.new_id("cmpl")
    works = []
    for index, prompt_ids in enumerate(prepared.prompts):
        name = request_id if len(prepared.prompts) == 1 else f"{request_id}-{index}"
        works.append(service.work(name, model, prompt_ids, "prompt", body, request))
        await asyncio.sleep(0)  # others have their turn between two prompts
    head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model.name}
    text = body.text_options()
    echoes = [
        await _echo(model.tokenizer, body, text, given, work)
        for given, work in zip(prepared.echoes, works, strict=True)
    ]
    run = _Run(service, model, body, works, echoes, text, head)
    retry_after_s = service.limits.retry_after_s
    if body.stream:
        return EventStream(_chunks(run), retry_after_s)
    return JSONAnswer(lambda: _whole(run), retry_after_s)


async def _echo(
    tokenizer: Tokenizer, body: CompletionBody, options: TextOptions, given: bytes, work: Work
) -> _Echo:
    """A text as it was given; ids as their text, up to what the first new token may change."""
    if given or not body.echo:
        return _Echo(given)
    stream = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
    pieces = []
    for begin in range(0, len(work.request.token_ids), IN_ONE_GO):
        pieces.append(stream.push_all(work.request.token_ids[begin : begin + IN_ONE_GO]))
        await asyncio.sleep(0)
    return _Echo(dumps("".join(pieces)), stream)


async def _chunks(run: _Run) -> AsyncGenerator[object, None]:
    body, usage = run.body, run.usage()
    begun = [False] * (len(run.works) * body.n)
    async with aclosing(merged(run, usage)) as deltas:
        async for prompt, delta in deltas:
            index = prompt * body.n + delta.choice
            first, begun[index] = not begun[index], True
            echo = run.echoes[prompt].text if first else b""
            text = delta.text
            by_token = body.logprobs is not None or body.return_token_ids
            if not (echo or text or delta.finish_reason or by_token):
                continue
            choice: dict[str, Any] = {
                "index": index,
                "logprobs": _logprobs(run, delta.tokens),
                "finish_reason": delta.finish_reason,
            }
            if body.return_token_ids:
                choice["token_ids"] = delta.token_ids
                choice["prompt_token_ids"] = run.works[prompt].request.token_ids if first else None
            members = {"text": joined(echo, dumps(text))}
            chunk = {**run.head, **usage_of_chunk(body.stream_options, usage)}
            yield with_members(chunk, {"choices": b"[" + with_members(choice, members) + b"]"})
    if body.stream_options.include_usage:
        yield {**run.head, "choices": [], "usage": usage_body(usage)}


async def _whole(run: _Run) -> Sequence[bytes]:
    body, usage = run.body, run.usage()
    choices = [_ChoiceSoFar() for _ in range(len(run.works) * body.n)]
    async with aclosing(merged(run, usage)) as deltas:
        async for prompt, delta in deltas:
            choices[prompt * body.n + delta.choice].add(delta, _logprobs(run, delta.tokens))
    return await whole(run.head, (choice.json(index, run) for index, choice in enumerate(choices)), usage)


async def whole(head: Mapping[str, Any], choices: Iterable[bytes], usage: Usage) -> Sequence[bytes]:
    """An answer that is given at once, in parts. `choices` are JSON, made one at a time."""
    parts = [dumps(head)[:-1] + b',"choices":[']
    for index, choice in enumerate(choices):
        parts += [b"," if index else b"", choice]
        await asyncio.sleep(0)  # others have their turn between two choices
    return [*parts, b'],"usage":' + dumps(usage_body(usage)) + b"}"]


class _ChoiceSoFar:
    """One choice of an answer that is given at once. Its lists are kept as JSON text."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._logprobs = {name: JSONList() for name in LOGPROBS}
        self._token_ids = JSONList()
        self._reason: str | None = None

    def add(self, delta: TextDelta, logprobs: Mapping[str, Sequence[object]] | None) -> None:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._reason = delta.finish_reason
        for name, values in (logprobs or {}).items():
            self._logprobs[name].extend(values)

    def json(self, index: int, run: _Run) -> bytes:
        prompt = index // run.body.n
        members = {"text": joined(run.echoes[prompt].text, dumps("".join(self._text)))}
        if run.body.logprobs is not None:
            lists = {name: values.text for name, values in self._logprobs.items()}
            members["logprobs"] = with_members({}, lists)
        if run.body.return_token_ids:
            members["token_ids"] = self._token_ids.text
            members["prompt_token_ids"] = dumps(run.works[prompt].request.token_ids)
        small = {"index": index, "finish_reason": self._reason}
        if run.body.logprobs is None:
            small["logprobs"] = None
        return with_members(small, members)


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
    queue: asyncio.Queue[tuple[int, TextDelta] | Exception | None] = asyncio.Queue(MAX_AHEAD)

    async def feed(index: int, work: Work) -> None:
        echoed = run.echoes[index].stream
        deltas = generate(dispatcher, tokenizer, work, run.text, usage, echoed)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    await queue.put((index, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks: list[asyncio.Task[None]] = []

    async def start() -> None:
        for index, work in enumerate(works):
            tasks.append(asyncio.create_task(feed(index, work)))
            await asyncio.sleep(0)  # placing a long prompt takes a while: one in a turn

    starting = asyncio.create_task(start())
    try:
        for _ in works:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.rejected_tokens,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }


def usage_of_chunk(options: StreamOptions, usage: Usage) -> dict[str, Any]:
    """The usage in a chunk: what was counted so far, null, or no such member."""
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


def _logprobs(run: _Run, tokens: Sequence[VisibleToken]) -> Mapping[str, Sequence[object]] | None:
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
        "text_offset": [visible.offset for visible in tokens],
    }
