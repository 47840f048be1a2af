"""The listener of `/metrics`: what it answers, and that no client takes more of it than it may."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from common.errors import ResourceError
from common.metrics import Metrics
from common.metrics_server import MOST_CONNECTIONS, MOST_HEAD_BYTES, MetricsServer
from common.settings.config import MetricsSettings
from tests.support.metrics import parsed
from tests.support.redis import wait_until

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[tuple[MetricsServer, list[int]]]:
    """A server, and a list that grows by one with each text that it makes."""
    metrics = Metrics()
    metrics.gauge("pdq_free_blocks", "free blocks").set(7)
    made: list[int] = []

    def render() -> bytes:
        made.append(1)
        return metrics.render()

    server = MetricsServer(MetricsSettings(), render, **limits)
    await server.start()
    try:
        yield server, made
    finally:
        await server.close()


async def ask(server: MetricsServer, sent: bytes) -> bytes:
    """All that comes back until the server ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_metrics_are_served_as_prometheus_reads_them() -> None:
    async with serving() as (server, _):
        head, _, body = (await ask(server, GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"text/plain; version=" in head
        assert parsed(body.decode())["pdq_free_blocks"] == 7.0
        head, _, body = (await ask(server, GET.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (GET.replace(b"/metrics", b"/"), 404),
        (GET.replace(b"/metrics", b"/metricsx"), 404),
        (GET.replace(b"GET", b"DELETE"), 405),
        (GET.replace(b"localhost", b"page.example"), 421),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 421),
        (b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03" + b"\n" * 9, 400),
        (b"GET /metrics HTTP/1.1\r\nHost: " + b"a" * 2 * MOST_HEAD_BYTES, 431),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", 405),
    ],
    ids=range(9),
)
async def test_anything_else_is_refused(sent: bytes, status: int) -> None:
    async with serving() as (server, made):
        assert (await ask(server, sent)).startswith(f"HTTP/1.1 {status} ".encode())
        assert not made


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nX: y\r\n"])
async def test_a_client_that_does_not_finish_its_request_is_cut_off(sent: bytes) -> None:
    async with serving(timeout_s=0.05) as (server, _):
        assert await ask(server, sent) == b""


async def test_a_client_that_leaves_before_its_request_is_complete_harms_nobody() -> None:
    async with serving() as (server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /me")
        writer.write_eof()
        assert b" 200 " in await ask(server, GET)
        writer.close()


async def test_who_waits_longest_for_its_own_request_makes_way_for_one_too_many() -> None:
    async with serving() as (server, _):
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(MOST_CONNECTIONS)]
        await wait_until(lambda: server.num_open == MOST_CONNECTIONS, "all are heard")
        assert b" 200 " in await ask(server, GET)
        with contextlib.suppress(ConnectionError):
            assert await idle[0][0].read() == b""
        for reader, writer in idle[1:]:
            writer.write(GET)
            assert b" 200 " in await reader.read()
        for _, writer in idle:
            writer.close()


async def test_nobody_makes_way_whose_request_is_complete() -> None:
    async with serving(pause_s=60.0) as (server, _):
        await ask(server, GET)
        asking = [asyncio.create_task(ask(server, GET)) for _ in range(MOST_CONNECTIONS)]
        await wait_until(lambda: server.num_answering == MOST_CONNECTIONS, "all are heard")
        assert await ask(server, GET) == b""
        assert not any(task.done() for task in asking)
    await asyncio.gather(*asking)


async def test_who_asks_again_at_once_waits_and_is_told_what_holds_then() -> None:
    metrics = Metrics()
    gauge = metrics.gauge("pdq_free_blocks", "free blocks")
    server = MetricsServer(MetricsSettings(), metrics.render, pause_s=0.05)
    await server.start()
    for number in (1.0, 2.0, 3.0):
        gauge.set(number)
        assert f"pdq_free_blocks {number}".encode() in await ask(server, GET)
    await server.close()


async def test_all_who_wait_cost_one_text_and_end_with_the_server() -> None:
    async with serving(pause_s=60.0) as (server, made):
        await ask(server, GET)
        asking = [asyncio.create_task(ask(server, GET)) for _ in range(MOST_CONNECTIONS)]
        await wait_until(lambda: server.num_open == MOST_CONNECTIONS, "all are heard")
        assert len(made) == 1
    assert set(await asyncio.gather(*asking)) == {b""}


async def test_who_is_connected_when_it_ends_is_cut_off() -> None:
    async with serving() as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await wait_until(lambda: server.num_open == 1, "it is heard")
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


async def test_a_port_that_is_taken_is_an_error_that_says_which_flag_names_another() -> None:
    async with serving() as (server, _):
        other = MetricsServer(MetricsSettings(port=server.port), lambda: b"")
        with pytest.raises(ResourceError, match="--metrics-port"):
            await other.start()
        await other.close()


async def test_without_a_port_nothing_listens() -> None:
    server = MetricsServer(MetricsSettings(port=None), lambda: b"")
    await server.start()
    assert (server.port, server.url("tcp://10.0.0.1:5")) == (0, "")
    await server.close()


@pytest.mark.parametrize(
    ("host", "endpoint", "shown"),
    [
        ("127.0.0.1", "tcp://10.0.0.1:5", "http://127.0.0.1:"),
        ("0.0.0.0", "tcp://10.0.0.1:5", "http://10.0.0.1:"),
        ("0.0.0.0", "tcp://[fd00::1]:5", "http://[fd00::1]:"),
        ("localhost", "tcp://10.0.0.1:5", "http://localhost:"),
    ],
)
async def test_its_url_is_one_at_which_others_find_it(host: str, endpoint: str, shown: str) -> None:
    server = MetricsServer(MetricsSettings(host=host), lambda: b"")
    await server.start()
    assert server.url(endpoint) == f"{shown}{server.port}"
    await server.close()


async def test_a_text_that_cannot_be_made_is_an_error_for_who_asked_and_the_next_one_is_made() -> None:
    answers = [RuntimeError("a bug"), b"pdq_free_blocks 7"]

    def render() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    server = MetricsServer(MetricsSettings(), render, pause_s=0.0)
    await server.start()
    try:
        assert (await ask(server, GET)).startswith(b"HTTP/1.1 500")
        assert (await ask(server, GET)).endswith(b"pdq_free_blocks 7")
    finally:
        await server.close()
