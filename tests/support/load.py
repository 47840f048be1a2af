"""Clients that keep a system busy, and what each of them must have got in the end.

Owns: asking over HTTP, as a stream or not, and holding the answer against the in-process engine's.
A client notes everything it is sent, so that a token that came twice or not at all shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import weakref
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from common.engine import Completion, Engine, SamplingParams
from tests.support.checkpoints import STORIES

Body = dict[str, Any]

LOST_S = 120.0

TYPED = {"service_unavailable": 503, "overloaded": 429, "request_aborted": 504, "link_lost": 503}


def bodies(
    count: int, *, max_tokens: tuple[int, int] = (60, 220), prompt: tuple[int, int] = (1, 200), seed: int = 11
) -> list[Body]:
    """Requests of every kind: greedy and seeded, penalties, one choice and three; long enough to
    be caught in the middle, so most of them ignore the end of a text."""
    random = np.random.default_rng(seed)
    result: list[Body] = []
    for index in range(count):
        length = int(random.integers(*prompt, endpoint=True))
        body: Body = {
            "prompt": [1, *random.integers(3, 512, length).tolist()],
            "max_tokens": int(random.integers(*max_tokens, endpoint=True)),
            "temperature": 0.0 if index % 3 == 0 else 0.9,
            "seed": int(random.integers(2**31)),
            "ignore_eos": index % 6 != 5,
        }
        if index % 4 == 2:
            body |= {"top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.2}
        if index % 5 == 1:
            body |= {"n": 3}
        result.append(body)
    return result


def truth(engine: Engine, asked: Sequence[Body]) -> list[list[Completion]]:
    """What the in-process engine says to each, all its choices in order. Asked once of an engine."""
    known = _KNOWN.setdefault(engine, {})
    key = json.dumps(asked)
    if key not in known:
        known[key] = _answers(engine, asked)
    return known[key]


_KNOWN: weakref.WeakKeyDictionary[Engine, dict[str, list[list[Completion]]]] = weakref.WeakKeyDictionary()


def _answers(engine: Engine, asked: Sequence[Body]) -> list[list[Completion]]:
    answers: dict[int, list[Completion]] = {}
    for n in {body.get("n", 1) for body in asked}:
        group = [index for index, body in enumerate(asked) if body.get("n", 1) == n]
        params = [
            SamplingParams(**{k: v for k, v in asked[i].items() if k not in ("prompt", "n")}) for i in group
        ]
        completions = engine.generate([asked[i]["prompt"] for i in group], params, n=n)
        for place, index in enumerate(group):
            answers[index] = completions[place * n : (place + 1) * n]
    return [answers[index] for index in range(len(asked))]


@dataclasses.dataclass(slots=True, eq=False)
class Client:
    """One request and all that came of it; `ask` may be cancelled, which is a disconnect."""

    body: Body
    stream: bool
    status: int = 0
    token_ids: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # by choice
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # if asked for
    error: dict[str, Any] | None = None
    ended_at: float = 0.0

    async def ask(self, http: httpx.AsyncClient, url: str) -> None:
        body = {"model": STORIES.name, "return_token_ids": True, **self.body}
        if self.stream:
            await self._streamed(http, url, body | {"stream": True})
        else:
            response = await http.post(f"{url}/v1/completions", json=body)
            self.status = response.status_code
            self._take(response.json())
        self.ended_at = time.monotonic()

    async def _streamed(self, http: httpx.AsyncClient, url: str, body: Body) -> None:
        async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
            self.status = response.status_code
            if response.status_code != 200:
                self._take(json.loads(await response.aread()))
                return
            done = False
            async for line in response.aiter_lines():
                if line:
                    assert not done, f"more after the end: {line}"
                    done = line == "data: [DONE]"
                    if not done:
                        self._take(json.loads(line.removeprefix("data: ")))
            assert done, "the stream broke off"

    def _take(self, answer: dict[str, Any]) -> None:
        assert self.error is None, f"more after an error: {answer}"
        self.error = answer.get("error")
        for choice in answer.get("choices", ()):
            index = choice["index"]
            assert index not in self.reasons, f"more of a choice that has ended: {choice}"
            self.token_ids.setdefault(index, []).extend(choice["token_ids"])
            if choice["logprobs"]:
                self.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))

    def check(self, completions: list[Completion], *, may_fail: bool = False) -> None:
        """Exactly these tokens; or, with `may_fail`, a beginning of them and a typed error."""
        expected = {c.choice: list(c.token_ids) for c in completions}
        if may_fail and self.error is not None:
            assert set(self.error) == {"message", "type", "param", "code"}, self.error
            assert self.error["code"] in TYPED, self.error
            assert self.status in (200, TYPED[self.error["code"]])
            for choice, ids in self.token_ids.items():
                assert ids == expected[choice][: len(ids)]
            return
        assert (self.status, self.error) == (200, None), (self.status, self.error)
        assert self.token_ids == expected
        assert self.reasons == {c.choice: c.finish_reason.value for c in completions}
        if "logprobs" in self.body:
            for c in completions:
                shown = c.logprobs[: len(expected[c.choice])]
                assert self.logprobs[c.choice] == [entry.logprob for entry in shown]


class Load:
    """`async with Load(url, bodies)`: all are asked at once, every other one streams, unless
    `streams` says it for all. Leaving it disconnects those that wait still."""

    def __init__(self, url: str, asked: Sequence[Body], *, streams: bool | None = None) -> None:
        self.clients = [
            Client(body, index % 2 == 0 if streams is None else streams) for index, body in enumerate(asked)
        ]
        self.tasks: list[asyncio.Task[None]] = []
        self._url = url
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120.0)

    async def __aenter__(self) -> Load:
        self.tasks = [asyncio.create_task(client.ask(self.http, self._url)) for client in self.clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.http.aclose()

    @property
    def num_begun(self) -> int:
        """Streams that have their first token, and are not over."""
        return sum(bool(c.num_tokens) and not c.ended_at for c in self.clients if c.stream)

    @property
    def num_open(self) -> int:
        return sum(not client.ended_at for client in self.clients)

    async def finish(self, completions: list[list[Completion]], *, may_fail: bool = False) -> float:
        """Wait for all and check them; when the last one ended, on the monotonic clock. What nobody is
        responsible for any more would last for ten minutes."""
        async with asyncio.timeout(LOST_S):
            await asyncio.gather(*self.tasks)
        for client, expected in zip(self.clients, completions, strict=True):
            client.check(expected, may_fail=may_fail)
        return max(client.ended_at for client in self.clients)
