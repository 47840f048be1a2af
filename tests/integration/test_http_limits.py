"""What a client may hold of a gateway by being slow, silent, endless or malformed: raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.settings.config import HTTPSettings
from gateway.app import create_app
from gateway.connection import Roster
from gateway.placement import DispatchLimits
from gateway.server import Server
from gateway.service import ServiceLimits
from tests.support.fake_cluster import FakeCluster, until
from tests.support.gateway_server import Served, make_service, serving
from tests.support.redis import HANGS_S

SHORT, LONG = 0.1, 30.0
BODY = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 8}


def settings(**limits: float) -> HTTPSettings:
    """Only what a test names is short."""
    defaults: dict[str, Any] = dict.fromkeys(
        ("header_timeout_s", "body_timeout_s", "keep_alive_timeout_s", "write_timeout_s"), LONG
    )
    return HTTPSettings(**{**defaults, **limits})


@contextlib.asynccontextmanager
async def gateway(http: HTTPSettings | None = None, **options: Any) -> AsyncIterator[Served]:
    cluster = FakeCluster()
    cluster.add("u1")
    async with serving(cluster, http=http or settings(), **options) as served:
        yield served


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @property
    def socket(self) -> socket.socket:
        found: socket.socket = self.writer.get_extra_info("socket")
        return found

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Everything until the gateway ends the connection."""
        async with asyncio.timeout(HANGS_S):
            return await self.reader.read()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next final answer that has a length."""
        async with asyncio.timeout(HANGS_S):
            while True:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                status = int(head.split()[1])
                if status >= 200:
                    break
            pairs = (line.partition(":") for line in head.split("\r\n")[1:-2])
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return status, headers, body


@contextlib.asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Client]:
    host, _, port = served.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def post(body: object, path: str = "/v1/completions", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    return head(len(data), path, headers) + data


def head(length: int, path: str = "/v1/completions", headers: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n{headers}\r\n"
    ).encode()


def error_of(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer that ends with its connection."""
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)["error"]["code"]


async def healthy(served: Served) -> bool:
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as http:
        return (await http.get("/health")).status_code == 200


# ── Time ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with gateway(settings(header_timeout_s=SHORT)) as served, connected(served) as client:
        assert await client.rest() == b""


@pytest.mark.parametrize("begin", [b"G", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_end_is_a_408(begin: bytes) -> None:
    async with gateway(settings(header_timeout_s=SHORT)) as served, connected(served) as client:
        client.send(begin)
        assert error_of(await client.rest()) == (408, "request_timeout")


async def test_the_second_head_on_a_connection_has_its_time_too() -> None:
    async with gateway(settings(header_timeout_s=SHORT)) as served, connected(served) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.send(b"GET /hea")
        assert error_of(await client.rest()) == (408, "request_timeout")


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    limits = settings(keep_alive_timeout_s=SHORT)
    async with gateway(limits) as served, connected(served) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 200
        assert await client.rest() == b""


async def test_a_body_that_does_not_end_is_a_408() -> None:
    async with gateway(settings(body_timeout_s=SHORT)) as served, connected(served) as client:
        client.send(head(100) + b'{"model"')
        assert error_of(await client.rest()) == (408, "request_timeout")
        assert served.service.bodies.held == 0


async def test_a_body_that_comes_byte_by_byte_has_no_more_time() -> None:
    async with gateway(settings(body_timeout_s=SHORT)) as served, connected(served) as client:
        client.send(head(10**6))

        async def dribble() -> None:
            while True:
                client.send(b" ")
                await asyncio.sleep(0.005)

        dribbling = asyncio.create_task(dribble())
        try:
            assert error_of(await client.rest()) == (408, "request_timeout")
        finally:
            dribbling.cancel()


async def test_a_body_that_nobody_reads_has_its_time_too() -> None:
    """`/health` answers without reading; the client goes on sending."""
    async with gateway() as served, connected(served) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.send(b"1\r\nx\r\n")
        assert await client.rest() == b""


async def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    async with gateway(settings(write_timeout_s=SHORT)) as served, connected(served) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(post({"tokens": [500] * 400_000}, "/detokenize") * 20)
        await until(lambda: any(c.unread for c in served.connections.open))
        await until(lambda: not served.connections.open)


# ── Shape ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "malformed_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed_http"),  # no host
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 20_000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 9_000 + b"\r\n", 431, "head_too_large"),
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "uri_too_long"),
        (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501, "not_implemented"),
        (
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
            b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "malformed_http",  # two ends: whoever stands before us may see the other
        ),
        (
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"1\r\n \r\n" * 5_000,
            400,
            "malformed_http",
        ),
        (
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            400,
            "malformed_http",
        ),
    ],
)
async def test_what_is_not_http_is_refused_in_openais_shape(request_: bytes, status: int, code: str) -> None:
    async with gateway() as served, connected(served) as client:
        client.send(request_)
        assert error_of(await client.rest()) == (status, code)


async def test_chunks_without_end_are_refused_once_they_are_too_much() -> None:
    limits = ServiceLimits(max_body_bytes=100_000)
    async with gateway(service_limits=limits) as served, connected(served) as client:
        client.send(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        client.send(b"transfer-encoding: chunked\r\n\r\n")
        client.send((b"1000\r\n" + b" " * 4096 + b"\r\n") * 100)
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
        assert await client.rest() == b""


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with gateway() as served, connected(served) as client:
        client.send(b"".join(post({"prompt": "a" * n}, "/tokenize") for n in range(1, 6)))
        counts = [json.loads((await client.answer())[2])["count"] for _ in range(5)]
        assert counts == sorted(counts)


# ── Number ───────────────────────────────────────────────────────────────────────────────────────


async def test_idle_connections_make_way_for_those_that_ask() -> None:
    async with gateway(settings(max_connections=20)) as served, contextlib.AsyncExitStack() as all_:
        for _ in range(200):
            client = await all_.enter_async_context(connected(served))
            client.send(b"POST /tokenize HTTP/1.1\r\n")
        assert await healthy(served)
        assert len(served.connections.open) <= 20


async def test_half_sent_bodies_make_way_for_those_that_ask() -> None:
    async with gateway(settings(max_connections=20)) as served, contextlib.AsyncExitStack() as all_:
        for _ in range(60):
            client = await all_.enter_async_context(connected(served))
            client.send(head(1_000_000) + b" " * 1000)
        assert await healthy(served)


async def test_connections_whose_answers_are_being_made_stay_and_the_next_gets_a_503() -> None:
    async with gateway(settings(max_connections=3)) as served, contextlib.AsyncExitStack() as all_:
        served.cluster.members["u1"].hold_at = 2
        clients = [await all_.enter_async_context(connected(served)) for _ in range(3)]
        for client in clients:
            client.send(post(BODY))
        await until(lambda: served.cluster.running == 3)
        async with connected(served) as late:
            late.send(post(BODY))
            answer = await late.rest()
        assert b"retry-after" in answer
        assert error_of(answer) == (429, "overloaded")
        served.cluster.release()
        assert [(await client.answer())[0] for client in clients] == [200] * 3


async def test_bodies_share_a_budget_and_one_client_gets_half_of_it() -> None:
    limits = ServiceLimits(max_body_bytes=2**20, max_bodies_bytes=2**20)
    async with gateway(service_limits=limits) as served, contextlib.AsyncExitStack() as all_:
        first = await all_.enter_async_context(connected(served))
        first.send(head(900_000) + b" " * 500_000)
        await until(lambda: served.service.bodies.held > 400_000)
        second = await all_.enter_async_context(connected(served))
        second.send(head(900_000) + b" " * 500_000)
        status, headers, body = await second.answer()
        assert (status, json.loads(body)["error"]["code"]) == (429, "overloaded")
        assert int(headers["retry-after"]) >= 1
        assert served.service.bodies.held <= 2**19
        async with httpx.AsyncClient(base_url=served.url) as http:  # small ones pass
            assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200
        first.writer.close()
        await until(lambda: served.service.bodies.held == 0)


async def test_a_list_of_prompts_that_could_never_be_open_is_a_bad_request() -> None:
    async with (
        gateway(limits=DispatchLimits(max_open=3)) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        answer = await http.post("/v1/completions", json={**BODY, "prompt": ["a"] * 4})
        assert answer.status_code == 400
        assert "3" in answer.json()["error"]["message"]
        fits = await http.post("/v1/completions", json={**BODY, "prompt": ["a"] * 3})
        assert fits.status_code == 200


async def test_a_list_of_prompts_is_opened_whole_or_not_at_all() -> None:
    async with gateway(limits=DispatchLimits(max_open=3)) as served:
        served.cluster.members["u1"].hold_at = 1
        async with httpx.AsyncClient(base_url=served.url) as http:
            first = asyncio.create_task(http.post("/v1/completions", json=BODY))
            await until(lambda: len(served.cluster.dispatched) == 1)
            answer = await http.post("/v1/completions", json={**BODY, "prompt": ["a"] * 3})
            assert answer.status_code == 429
            assert len(served.cluster.dispatched) == 1
            served.cluster.release()
            assert (await first).status_code == 200


# ── Half-closed ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_shuts_down_its_sending_half_gets_its_answer(stream: bool) -> None:
    async with gateway() as served, connected(served) as client:
        served.cluster.members["u1"].hold_at = 2
        client.send(post({**BODY, "stream": stream}))
        client.writer.write_eof()
        await until(lambda: len(served.cluster.acks) >= 1)
        await until(lambda: all(c.half_closed for c in served.connections.open))
        served.cluster.release()
        answer = await client.rest()
        assert b"HTTP/1.1 200" in answer
        assert b"[DONE]" in answer if stream else b'"finish_reason":"length"' in answer


async def test_pipelined_requests_before_a_half_close_are_all_answered() -> None:
    async with gateway() as served, connected(served) as client:
        client.send(post(BODY) * 3)
        client.writer.write_eof()
        assert [(await client.answer())[0] for _ in range(3)] == [200] * 3
        assert await client.rest() == b""


@pytest.mark.parametrize(("stream", "tokens"), [(False, 0), (True, 0), (True, 3)])
@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_is_gone_is_seen_although_nothing_is_written(
    stream: bool, tokens: int, how: str, version: str
) -> None:
    async with gateway() as served, connected(served) as client:
        served.cluster.members["u1"].hold_at = tokens
        client.send(post({**BODY, "stream": stream}).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        await until(lambda: served.cluster.running == 1)
        if tokens:
            await client.reader.readuntil(b"data: ")
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.writer.close()
        await until(lambda: served.dispatcher.num_open == 0)
        await until(lambda: served.cluster.ended)  # the write follows in a task of its own
        assert [state for state, _, _ in served.cluster.ended.values()] == ["cancelled"]
        await until(lambda: not served.connections.open)


async def test_half_a_body_and_then_no_more_is_a_client_that_is_gone() -> None:
    async with gateway() as served, connected(served) as client:
        client.send(head(100) + b"{")
        client.writer.write_eof()
        assert await client.rest() == b""


# ── What is said ─────────────────────────────────────────────────────────────────────────────────


async def test_a_wrong_method_says_which_are_right() -> None:
    async with gateway() as served, httpx.AsyncClient(base_url=served.url) as http:
        for method, path, allowed in (
            ("GET", "/v1/completions", {"POST"}),
            ("BREW", "/tokenize", {"POST"}),
            ("POST", "/health", {"GET", "HEAD"}),
        ):
            answer = await http.request(method, path)
            assert answer.status_code == 405
            assert answer.json()["error"]["code"] == "method_not_allowed"
            assert set(answer.headers["allow"].split(", ")) == allowed
        options = await http.options("/v1/completions")
        assert (options.status_code, options.headers["allow"]) == (204, "POST")
        head_ = await http.head("/health")
        assert (head_.status_code, head_.content) == (200, b"")
        unknown = await http.get("/v2")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/completions/", "/health/", "/v1/models//", "//health"])
async def test_no_client_is_sent_elsewhere_by_what_it_calls_us(path: str) -> None:
    async with gateway() as served, httpx.AsyncClient(base_url=served.url) as http:
        answer = await http.get(served.url + path, headers={"host": "elsewhere.example"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
        assert "location" not in answer.headers


async def test_a_compressed_body_is_refused_as_that() -> None:
    async with gateway() as served, httpx.AsyncClient(base_url=served.url) as http:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        body = gzip.compress(json.dumps(BODY).encode())
        answer = await http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 415
        assert answer.json()["error"]["param"] == "Content-Encoding"
        headers["content-encoding"] = "identity"
        answer = await http.post("/v1/completions", content=json.dumps(BODY), headers=headers)
        assert answer.status_code == 200


async def test_a_request_to_upgrade_is_answered_as_any_other_without_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gateway() as served, httpx.AsyncClient(base_url=served.url) as http:
        headers = {"connection": "upgrade", "upgrade": "websocket"}
        assert (await http.get("/health", headers=headers)).status_code == 200
    assert caplog.records == []


HUGE = "x" * 2_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**BODY, HUGE: 1}),
        ("/v1/completions", {**BODY, "model": HUGE}),
        ("/v1/completions", {**BODY, "logit_bias": {HUGE: 1}}),
        ("/v1/completions", {**BODY, "stop": [[HUGE]]}),
        ("/v1/completions", {**BODY, "stream_options": {HUGE: 1}, "stream": True}),
        ("/v1/completions", {**BODY, "prompt": [[HUGE]]}),
        ("/detokenize", {"tokens": [HUGE]}),
        ("/tokenize", {"messages": [{"role": HUGE, "content": "x"}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x", HUGE: 1}]}),
    ],
)
async def test_no_error_sends_back_what_a_client_sent_at_length(path: str, body: object) -> None:
    limits = ServiceLimits(unknown_fields="refuse")
    async with (
        gateway(service_limits=limits) as served,
        httpx.AsyncClient(base_url=served.url, timeout=20) as http,
    ):
        answer = await http.post(path, json=body)
        assert answer.status_code in (400, 404), answer.text[:200]
        assert len(answer.content) < 4_000


async def test_control_characters_are_escaped_in_errors() -> None:
    async with gateway() as served, httpx.AsyncClient(base_url=served.url) as http:
        for path in ("/v1/models/%00%1b[31m%0a", "/%00%1b[31m%0a"):
            answer = await http.get(path)
            assert answer.status_code == 404
            assert answer.content.isascii()
            assert not any(byte < 32 for byte in answer.content)


async def test_a_gateway_that_cannot_look_at_its_connections_any_more_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing would bound what clients take of it."""
    service = make_service(FakeCluster())
    server = Server(create_app(service), HTTPSettings())
    error = RuntimeError("a bug")

    def fail(roster: Roster, now: float) -> None:
        raise error

    monkeypatch.setattr(Roster, "check", fail)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await asyncio.wait_for(server.serve(sockets=[listener]), HANGS_S)
    service.intake.close()
    assert server.failure is error
