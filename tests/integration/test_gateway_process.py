"""The gateway as a process, with real Redis, real ZeroMQ and nodes that only lack an engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from common.store.client import RedisClient
from common.store.registry import Registry, Role
from common.store.requests import Requests, State
from gateway.bodies import FREE_BYTES
from gateway.intake.pool import SHORT_BODY
from tests.support.fake_cluster import until
from tests.support.gateway_server import MODELS
from tests.support.metrics import scrape
from tests.support.mini_node import MiniNode
from tests.support.redis import HANGS_S, redis_client, redis_server, wait_until

__all__ = ["redis_client", "redis_server"]

BODY: dict[str, Any] = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 30, "seed": 3}
ROOT = Path(__file__).parents[2]
AT_ONCE_S = 20.0  # a drain would take 30


@dataclasses.dataclass(slots=True)
class Process:
    """A gateway that listens."""

    url: str
    process: asyncio.subprocess.Process
    lines: list[str]

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@dataclasses.dataclass(slots=True)
class Sent:
    """A request on a connection of its own, byte by byte."""

    answer: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    @contextlib.asynccontextmanager
    async def to(
        cls, gateway: Process, path: str, body: bytes, announced: int | None = None
    ) -> AsyncIterator[Sent]:
        url = httpx.URL(gateway.url)
        own = socket.socket()
        # What we do not read stays there: with a small window for small segments, Linux keeps about
        # 40 KB for both ends of a connection, where it would keep megabytes.
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        own.connect((url.host, url.port))
        answer, writer = await asyncio.open_connection(sock=own, limit=64)
        length = len(body) if announced is None else announced
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\n\r\n".encode()
        )
        writer.write(body)
        await writer.drain()
        try:
            yield cls(answer, writer)
        finally:
            writer.close()


def detokenize(answer_bytes: int) -> bytes:
    """A body whose answer has so many bytes: six for two of the body's, since each token is a
    character that JSON escapes."""
    return b'{"tokens":[%s]}' % b",".join([b"3"] * (answer_bytes // 6))


def command(*flags: str) -> list[str]:
    return [
        sys.executable,
        "-W",
        "error",
        "-m",
        "gateway",
        "--port",
        "0",
        "--model",
        str(MODELS / "stories260K"),
        "--served-model-name",
        "stories",
        "--bus-beat-interval-s",
        "0.05",
        *flags,
    ]


def environment(redis_url: str) -> dict[str, str]:
    return {**os.environ, "PYTHONFAULTHANDLER": "1", "PDQ_REDIS_URL": redis_url}


def with_descriptors(count: int, command: list[str]) -> list[str]:
    return ["sh", "-c", f'ulimit -n {count}; exec "$@"', "sh", *command]


@contextlib.asynccontextmanager
async def started(redis_url: str, *flags: str, descriptors: int | None = None) -> AsyncIterator[Process]:
    line = command(*flags)
    process = await asyncio.create_subprocess_exec(
        *(line if descriptors is None else with_descriptors(descriptors, line)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
        env=environment(redis_url),
    )
    lines: list[str] = []

    async def read() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            lines.append(line.decode().rstrip())

    reading = asyncio.create_task(read())
    try:
        await until(lambda: re.search(r"url=(\S+)", "\n".join(lines)) or process.returncode)
        found = re.search(r"url=(\S+)", "\n".join(lines))
        assert found, "\n".join(lines)
        yield Process(found[1], process, lines)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANGS_S):
                await process.wait()
        hangs = process.returncode is None
        if hangs:
            process.send_signal(signal.SIGABRT)  # faulthandler says where
            await process.wait()
        await reading
        assert not hangs, "\n".join(lines)
        bad = [line for line in lines if " ERROR " in line or "Traceback" in line]
        assert not bad, bad


@contextlib.asynccontextmanager
async def a_node(
    client: RedisClient, gateway: Process, *, hold_at: int | None = None
) -> AsyncIterator[MiniNode]:
    """A node that the gateway has linked with."""
    async with MiniNode(client, hold_at=hold_at).running() as node:
        linked = f"node.linked node={node.incarnation}"
        await until(lambda: any(linked in line for line in gateway.lines))
        yield node


@pytest.fixture
async def gateway(redis_client: RedisClient) -> AsyncIterator[Process]:
    async with started(redis_client.settings.url) as process:
        yield process


async def the_text(gateway: Process) -> str:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        answer = await http.post("/v1/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def test_a_request_goes_through_redis_and_back_over_the_bus(
    gateway: Process, redis_client: RedisClient
) -> None:
    async with a_node(redis_client, gateway) as node:
        assert len(await the_text(gateway)) > 20
        requests = Requests(redis_client)

        async def finished() -> bool:
            return [r.state for r in await requests.recent()] == [State.FINISHED]

        await wait_until(finished, "the record is closed")
        (record,) = await requests.recent()
        (choice,) = record.choices
        assert (choice.generated, choice.finish_reason, choice.prefill_node) == (
            30,
            "length",
            node.incarnation,
        )
        (dispatch,) = node.taken
        key = (dispatch.request.id, 1, 0)
        await until(lambda: node.acknowledged.get(key) == dispatch.request.prompt_len + 30)
        assert await requests.open_requests(dispatch.request.gateway) == set()
        assert (await requests.loads([node.incarnation]))[node.incarnation].requests == 0


async def test_what_the_links_with_nodes_count_is_among_the_metrics(
    gateway: Process, redis_client: RedisClient
) -> None:
    async with a_node(redis_client, gateway):
        found = await scrape(gateway.url)
    assert found["pdq_bus_peers"] == 1
    assert found.get("pdq_bus_events_total", event="sent") > 0
    assert found.get("pdq_bus_events_total", event="received") > 0
    assert found.total("pdq_gateway_unsent_messages_total") == 0
    assert found["pdq_gateway_strangers_messages_total"] == 0


async def test_the_death_of_a_node_changes_no_token(gateway: Process, redis_client: RedisClient) -> None:
    async with a_node(redis_client, gateway) as first:
        truth = await the_text(gateway)
        first.hold_at = 7
        text = ""
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(gateway.openai())
            stream = await client.completions.create(**BODY, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].text
                if len(first.taken) == 2 and len(text) >= 7 and first.computing:
                    second = await stack.enter_async_context(a_node(redis_client, gateway))
                    await first.die()
            assert text == truth
            (retry,) = second.taken
            assert (retry.attempt, len(retry.request.token_ids)) == (2, retry.request.prompt_len + 7)


async def test_a_disconnect_reaches_the_node(gateway: Process, redis_client: RedisClient) -> None:
    async with a_node(redis_client, gateway, hold_at=5) as node:
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
            await until(lambda: node.acknowledged)
            asking.cancel()
            await until(lambda: not node.computing)
        requests = Requests(redis_client)

        async def cancelled() -> bool:
            return [r.state for r in await requests.recent()] == [State.CANCELLED]

        await wait_until(cancelled, "the record is closed")


async def test_an_open_request_outlives_the_memory_of_redis(
    gateway: Process, redis_client: RedisClient
) -> None:
    async with a_node(redis_client, gateway) as node:
        truth = await the_text(gateway)
        node.hold_at = 5
        async with gateway.openai() as client:
            asking = asyncio.create_task(client.completions.create(**BODY))
            await until(lambda: node.computing and len(node.acknowledged) == 2)
            await redis_client.command("FLUSHALL")
            requests = Requests(redis_client)

            async def known_again() -> bool:
                return len(await requests.recent()) == 1

            await wait_until(known_again, "the gateway has asserted it again")
            node.release()
            assert (await asking).choices[0].text == truth


async def test_a_drain_lets_open_streams_finish_and_leaves_nothing(redis_client: RedisClient) -> None:
    async with started(redis_client.settings.url) as gateway:
        async with a_node(redis_client, gateway, hold_at=5) as node, gateway.openai() as client:
            asking = asyncio.create_task(client.completions.create(**BODY))
            await until(lambda: node.acknowledged)
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: any("gateway.draining open=1" in line for line in gateway.lines))
            async with httpx.AsyncClient(base_url=gateway.url) as http:

                async def refuses() -> bool:
                    with contextlib.suppress(httpx.TransportError):
                        answer = await http.post("/v1/completions", json=BODY)
                        return answer.status_code == 503
                    return True

                await wait_until(refuses, "new requests are refused")
            node.release()
            assert (await asking).choices[0].finish_reason == "length"
            async with asyncio.timeout(AT_ONCE_S):
                assert await gateway.process.wait() == 0
        snapshot = await Registry(redis_client).snapshot()
        assert snapshot.of_role(Role.GATEWAY) == []


async def test_a_second_signal_ends_it_at_once(redis_client: RedisClient) -> None:
    async with (
        started(redis_client.settings.url) as gateway,
        a_node(redis_client, gateway, hold_at=5) as node,
        gateway.openai() as client,
    ):
        asking = asyncio.create_task(client.completions.create(**BODY))
        await until(lambda: node.acknowledged)
        gateway.process.send_signal(signal.SIGINT)
        await until(lambda: any("gateway.draining" in line for line in gateway.lines))
        gateway.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.InternalServerError, match="this gateway ends"):
            await asking
        async with asyncio.timeout(AT_ONCE_S):
            assert await gateway.process.wait() == 0
        await until(lambda: not node.computing, "the node was told")


async def test_bodies_that_are_not_read_yet_end_with_the_gateway_too(redis_client: RedisClient) -> None:
    """Half of one is here, another one is being worked on, of a third the client takes no answer."""
    short, long = detokenize(190_000), detokenize(300_000)
    assert len(short) < SHORT_BODY  # a longer one waits until nobody else wants a processor
    assert len(long) > 1.5 * FREE_BYTES  # bytes beyond those are among the metrics
    async with started(redis_client.settings.url) as gateway, Sent.to(gateway, "/detokenize", long) as unread:
        assert b"200" in await unread.answer.readuntil(b"\r\n")
        (forker,) = psutil.Process(gateway.process.pid).children()
        for process in (*forker.children(), forker):  # from now on no body is worked on
            process.suspend()
        async with (
            Sent.to(gateway, "/detokenize", long[:-10], announced=len(long)) as half,
            Sent.to(gateway, "/detokenize", long) as waiting,
        ):

            async def both_are_here() -> bool:
                held = (await scrape(gateway.url))["pdq_gateway_body_bytes"]
                return held == 2 * (len(long) - FREE_BYTES) - 10

            await wait_until(both_are_here, "the gateway has half of one body and all of another")
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: any("gateway.draining" in line for line in gateway.lines))
            gateway.process.send_signal(signal.SIGTERM)
            for sent in (half, waiting):
                assert b"503" in await sent.answer.readuntil(b"\r\n")
                assert b"this gateway ends" in await sent.answer.read()
        async with asyncio.timeout(AT_ONCE_S):
            assert await gateway.process.wait() == 0
        (line,) = (line for line in gateway.lines if "gateway.cut_off" in line)
        assert "connections=1" in line


async def test_a_drain_ends_with_its_grace_period(redis_client: RedisClient) -> None:
    flags = ("--grace-period-s", "0.1")
    async with (
        started(redis_client.settings.url, *flags) as gateway,
        a_node(redis_client, gateway, hold_at=5) as node,
        gateway.openai() as client,
    ):
        asking = asyncio.create_task(client.completions.create(**BODY))
        await until(lambda: node.acknowledged)
        gateway.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="this gateway ends"):
            await asking
        async with asyncio.timeout(AT_ONCE_S):
            assert await gateway.process.wait() == 0


async def test_two_gateways_share_the_nodes(gateway: Process, redis_client: RedisClient) -> None:
    async with started(redis_client.settings.url) as other, a_node(redis_client, gateway) as node:
        linked = f"node.linked node={node.incarnation}"
        await until(lambda: any(linked in line for line in other.lines))
        one, two = await asyncio.gather(the_text(gateway), the_text(other))
        assert one == two
        assert len({dispatch.request.gateway for dispatch in node.taken}) == 2


async def test_few_descriptors_mean_few_connections_and_a_short_log(redis_client: RedisClient) -> None:
    url = redis_client.settings.url
    async with started(url, descriptors=240) as gateway, a_node(redis_client, gateway):
        host, _, port = gateway.url.removeprefix("http://").partition(":")
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(socket.create_connection((host, int(port))))
            assert await the_text(gateway)
            async with httpx.AsyncClient(base_url=gateway.url) as http:
                assert (await http.get("/health")).status_code == 200
    (warning,) = [line for line in gateway.lines if "descriptors.few" in line]
    assert "used=48" in warning
    assert len("\n".join(gateway.lines)) < 20_000


async def test_descriptors_that_run_out_are_one_line_and_connections_wait(redis_client: RedisClient) -> None:
    """The process's limit falls below what is open already: nothing can be accepted."""
    async with started(redis_client.settings.url) as gateway:
        host, _, port = gateway.url.removeprefix("http://").partition(":")
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            assert (await http.get("/health")).status_code == 200  # it has begun to serve
        pid = gateway.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, before)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, before[1]))
            for _ in range(200):
                stack.enter_context(socket.create_connection((host, int(port))))
            await until(lambda: any("connection.not_accepted" in line for line in gateway.lines))
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            assert (await http.get("/health")).status_code == 200
    assert len("\n".join(gateway.lines)) < 20_000


@pytest.mark.parametrize("trouble", ["port", "redis", "model", "setting", "public", "key", "descriptors"])
async def test_what_keeps_it_from_starting_is_one_line(redis_client: RedisClient, trouble: str) -> None:
    url = redis_client.settings.url
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags, wanted = {
            "port": (("--port", str(taken.getsockname()[1])), "is taken; --port names another"),
            "redis": (
                ("--redis-url", "redis://127.0.0.1:1", "--redis-retry-s", "0"),
                "--redis-url or PDQ_REDIS_URL",
            ),
            "model": (("--model", "/no/such/folder"), "/no/such/folder"),
            "setting": (("--max-n", "none"), "max-n"),
            "descriptors": ((), "ulimit -n"),
            "public": (("--host", "0.0.0.0"), "without API keys only loopback"),
            "key": (("--api-key", "tops3cret"), "PDQ_API_KEYS"),
        }[trouble]
        line_ = command(*flags)
        if trouble == "descriptors":
            line_ = with_descriptors(100, line_)
        process = await asyncio.create_subprocess_exec(
            *line_, cwd=ROOT, stderr=asyncio.subprocess.PIPE, env=environment(url)
        )
        _, output = await process.communicate()
    assert process.returncode == 1
    (line,) = output.decode().splitlines()
    assert wanted in line
    assert "tops3cret" not in line


async def pdq(redis_url: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "common.cli",
        *arguments,
        cwd=ROOT,
        env={**os.environ, "PDQ_REDIS_URL": redis_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_dead_letter_is_shown_and_computed_once_more_alone(
    gateway: Process, redis_client: RedisClient
) -> None:
    url = redis_client.settings.url
    requests = Requests(redis_client)
    async with a_node(redis_client, gateway) as node:
        await the_text(gateway)
        (dispatch,) = node.taken
        await requests.dead_letter(dispatch, "p-1: a kernel failed")
        code, shown = await pdq(url, "queue", "dead")
        assert code == 0
        assert dispatch.request.id in shown
        assert "p-1: a kernel failed" in shown
        _, listed = await pdq(url, "queue", "dead", "--json")
        (letter,) = json.loads(listed)
        assert tuple(letter["dispatch"]["request"]["token_ids"]) == dispatch.request.token_ids
        code, outcome = await pdq(url, "queue", "requeue", letter["id"], "--json")
        assert code == 0, outcome
        record = json.loads(outcome)
        assert record["request"].startswith(f"{dispatch.request.id}-again-")
        assert record["state"] == "finished"
        assert record["choices"][0]["generated"] == BODY["max_tokens"]
        replay = node.taken[-1]
        assert replay.alone
        name = node.incarnation
        code, outcome = await pdq(url, "queue", "requeue", letter["id"], "--node", name, "--json")
        assert code == 0, outcome
        assert node.taken[-1].node == name
        code, error = await pdq(url, "queue", "requeue", letter["id"], "--node", "p-9")
        assert (code, error) == (1, "pdq queue: node 'p-9' is not there; `pdq nodes` lists them\n")
        assert (replay.request.token_ids, replay.request.params) == (
            dispatch.request.token_ids,
            dispatch.request.params,
        )
    code, error = await pdq(url, "queue", "requeue", "nothing")
    assert (code, error) == (1, "pdq queue: no dead letter 'nothing' that can be read\n")
