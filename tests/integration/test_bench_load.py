"""The load client against a server that decides when it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from common import cli
from common.commands.bench.client import Client, Exchange, read
from tests.support.redis import HANGS_S, wait_until

Answering = Callable[["StubServer", asyncio.StreamWriter], Awaitable[None]]


class StubServer:
    """Speaks as much HTTP as the client needs. `answer` makes the answer to a completion."""

    def __init__(self, answer: Answering) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0
        self.arrived = asyncio.Condition()
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (
                        int(line[15:])
                        for line in head.lower().split("\r\n")
                        if line.startswith("content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                if head.startswith("GET /v1/models "):
                    model = {"id": "stub", "max_model_len": 100}
                    self._json(writer, {"data": [model]})
                elif head.startswith("POST /tokenize "):
                    self._json(writer, {"tokens": list(range(50))})
                else:
                    await self._complete(json.loads(body), writer)
                    break

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        async with self.arrived:
            self.bodies.append(body)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.arrived.notify_all()
        try:
            await self.answer(self, writer)
        finally:
            self.open -= 1

    async def until(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.bodies) >= count)

    def _json(self, writer: asyncio.StreamWriter, value: object) -> None:
        data = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))


def stream(writer: asyncio.StreamWriter) -> None:
    events = [
        {"choices": [{"text": "a", "finish_reason": None}]},
        {"choices": [{"text": "b", "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 2}},
    ]
    body = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body + b"data: [DONE]\n\n")


async def test_a_request_that_the_caller_gives_up_keeps_what_had_come() -> None:
    async def then_nothing(server: StubServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n')
        await server.until(2)

    server = StubServer(then_nothing)
    async with server.listening() as url, asyncio.timeout(HANGS_S):
        client, result = Client(url, "", HANGS_S), Exchange(0.0)
        task = asyncio.create_task(client.exchange(client.encode({}), result))
        await wait_until(lambda: bool(result.pieces), "the first event has come")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(read(result).token_times) == 1


async def bench(url: str, report: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    arguments = [
        "bench",
        "--url",
        url,
        "--json",
        str(report),
        "--warmup",
        "0",
        "--prompt-len",
        "8",
        "--redis-url",
        "redis://127.0.0.1:1",
        "--redis-retry-s",
        "0",
        *flags,
    ]
    return await asyncio.to_thread(lambda: (cli.main(arguments), json.loads(report.read_text())))


async def test_the_open_loop_waits_for_no_answer(tmp_path: Path) -> None:
    async def once_all_have_arrived(server: StubServer, writer: asyncio.StreamWriter) -> None:
        await server.until(10)
        stream(writer)

    server = StubServer(once_all_have_arrived)
    async with server.listening() as url, asyncio.timeout(HANGS_S):
        code, report = await bench(url, tmp_path / "b.json", "--requests", "10", "--rate", "100")
    assert code == 0
    assert server.most_open == 10
    summary = report["summary"]
    assert summary["succeeded"] == 10
    # The first waited for the last, whose arrival the schedule gives.
    rows = report["requests"]
    assert rows[0]["event_times_s"][0] - rows[0]["arrived_at_s"] >= rows[-1]["arrived_at_s"]
    assert all(row["late_s"] >= 0 for row in rows)


async def test_the_closed_loop_keeps_so_many_open(tmp_path: Path) -> None:
    async def in_threes(server: StubServer, writer: asyncio.StreamWriter) -> None:
        await server.until(min(9, 3 * -(-len(server.bodies) // 3)))
        stream(writer)

    server = StubServer(in_threes)
    async with server.listening() as url, asyncio.timeout(HANGS_S):
        flags = ("--requests", "9", "--concurrency", "3")
        code, report = await bench(url, tmp_path / "b.json", *flags)
    assert code == 0
    assert server.most_open == 3
    assert report["summary"]["succeeded"] == 9


async def test_the_same_seed_sends_the_same_requests(tmp_path: Path) -> None:
    async def at_once(_: StubServer, writer: asyncio.StreamWriter) -> None:
        stream(writer)

    sent = []
    for seed in ("1", "1", "2"):
        server = StubServer(at_once)
        async with server.listening() as url, asyncio.timeout(HANGS_S):
            flags = ("--requests", "4", "--concurrency", "1", "--seed", seed, "--ignore-eos")
            await bench(url, tmp_path / "b.json", *flags)
        sent.append(server.bodies)
    assert sent[0] == sent[1] != sent[2]
    assert sent[0][0]["ignore_eos"]
    assert all(len(body["prompt"]) == 8 for body in sent[0])
    assert len({tuple(body["prompt"]) for body in sent[0]}) == 4


async def test_failures_are_counted_and_a_run_of_nothing_else_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse(_: StubServer, writer: asyncio.StreamWriter) -> None:
        body = b'{"error": {"message": "come back later", "code": "overloaded"}}'
        writer.write(b"HTTP/1.1 429 No\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    server = StubServer(refuse)
    async with server.listening() as url, asyncio.timeout(HANGS_S):
        code, report = await bench(url, tmp_path / "b.json", "--requests", "3", "--rate", "500")
    assert code == 1
    assert report["summary"]["errors"] == {"overloaded": 3}
    said = capsys.readouterr().out
    assert "failed: 3 (overloaded 3)" in said
    assert "overloaded: come back later" in said


async def test_an_answer_that_never_comes_is_a_timeout(tmp_path: Path) -> None:
    async def never(server: StubServer, writer: asyncio.StreamWriter) -> None:
        await server.until(10**6)

    server = StubServer(never)
    async with asyncio.timeout(HANGS_S), server.listening() as url:
        flags = ("--requests", "2", "--rate", "100", "--timeout", "0.2")
        code, report = await bench(url, tmp_path / "b.json", *flags)
    assert code == 1
    assert report["summary"]["errors"] == {"timeout": 2}


async def test_secrets_are_in_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def at_once(_: StubServer, writer: asyncio.StreamWriter) -> None:
        stream(writer)

    flags = ["--requests", "1", "--concurrency", "1"]
    monkeypatch.setenv("PDQ_API_KEY", "hunter2")
    monkeypatch.setattr("sys.argv", ["pdq", "bench", *flags])
    server = StubServer(at_once)
    async with server.listening() as url, asyncio.timeout(HANGS_S):
        await bench(url, tmp_path / "b.json", *flags)
    assert "hunter2" not in (tmp_path / "b.json").read_text() + capsys.readouterr().out
