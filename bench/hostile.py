"""A gateway under bodies that cost it most, all the time: `python -m bench.hostile`.

`pdq serve --unified 1` with the shipped model serves a few streams. One process asks `/health` every
10 ms and notes the longest gap between two events of a stream; another sends hostile bodies without
pause, one connection for each kind. Both are measured first without, then with the hostile bodies.
The streams ask for token ids, since a token without text is no event otherwise. Two numbers say how
much of it is the machine's: the lag of the measuring process itself, which goes first, and the cores
that processes took which are not ours. Needs no GPU.

With `--http-only` the gateway's HTTP side runs alone, with nodes that give a token every 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil

from bench.served import served
from common.processor_share import set_share_of_session

MEGABYTE = 2**20
LIMIT = 4 * MEGABYTE - 1000  # under the default of --max-body-bytes
PROMPT = [300 + n for n in range(16)]
STREAMS, TOKENS = 4, 300
GRACE_S = 10.0  # for what was asked before the time was over
GO_FIRST = -10  # the niceness of the measuring session; all that it starts has one of its own


def bodies(model: str) -> dict[str, tuple[str, bytes]]:
    """Path and body of each kind."""
    chat = [{"role": "user", "content": "a" * (LIMIT - 200)}]
    kinds: dict[str, tuple[str, Any]] = {
        "one character, 4 MB": ("/v1/completions", {"prompt": "a" * (LIMIT - 100)}),
        "50 prompts, 4 MB": ("/v1/completions", {"prompt": ["word " * 16_000] * 50}),
        "a million strings as ids": ("/detokenize", {"tokens": ["a"] * 800_000}),
        "ids to text": ("/detokenize", {"tokens": [500] * 800_000}),
        "text to strings": ("/tokenize", {"prompt": "word " * 800_000, "return_token_strs": True}),
        "a chat of 4 MB": ("/v1/chat/completions", {"messages": chat}),
        "a million unknown fields": ("/v1/completions", {f"k{n}": n for n in range(200_000)}),
    }
    found = {name: (path, json.dumps(body).encode()) for name, (path, body) in kinds.items()}
    deep = b'{"prompt": ' + b"[" * 1_900_000 + b"]" * 1_900_000 + b"}"
    return {**found, "deep": ("/v1/completions", deep)}


async def http_only() -> None:
    """Serve with nodes that are no processes; prints the port."""
    from tests.support.fake_cluster import FakeCluster, FakeNode
    from tests.support.gateway_server import serving

    class Paced(FakeCluster):
        async def _held(self, node: FakeNode, index: int) -> None:
            await asyncio.sleep(0.01)

    cluster = Paced()
    cluster.add("u1", total_blocks=4096)
    async with serving(cluster) as running:
        print(running.url.rpartition(":")[2], flush=True)
        await asyncio.Event().wait()


@contextlib.contextmanager
def served_http_only() -> Iterator[tuple[psutil.Process, int]]:
    command = [sys.executable, "-m", "bench.hostile", "--be", "server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        yield psutil.Process(process.pid), int(process.stdout.readline())
        process.kill()


async def exchange(
    port: int, path: str, body: bytes | None
) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send one request on a connection of its own; status, and what follows the head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    method = "GET" if body is None else "POST"
    writer.write(
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body or b'')}\r\nconnection: close\r\n\r\n".encode()
    )
    if body:
        writer.write(body)
        with contextlib.suppress(OSError):
            await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split()[1]), reader, writer


async def attack(port: int) -> None:
    """Send each kind without pause until killed; prints what was answered, as JSON."""
    answers: dict[str, dict[int, int]] = {}

    async def one(name: str, path: str, body: bytes) -> None:
        while True:
            status = 0
            with contextlib.suppress(OSError, EOFError):
                status, reader, writer = await exchange(port, path, body)
                while await reader.read(MEGABYTE):
                    pass
                writer.close()
            counts = answers.setdefault(name, {})
            counts[status] = counts.get(status, 0) + 1

    tasks = [asyncio.create_task(one(name, *what)) for name, what in bodies("").items()]
    await asyncio.to_thread(sys.stdin.read)  # until our parent has had enough
    for task in tasks:
        task.cancel()
    print(json.dumps(answers))


async def measure(port: int, seconds: float) -> dict[str, float]:
    """Latencies of `/health` and gaps of streams, in milliseconds."""
    end = time.monotonic() + seconds
    health: list[float] = []
    gaps: list[float] = []
    lags: list[float] = []
    failed: list[int] = []  # what streams were answered instead

    waiting: dict[object, tuple[float, list[float]]] = {}  # since when, for what

    async def ask() -> None:
        me, begin = object(), time.monotonic()
        waiting[me] = begin, health
        _, reader, writer = await exchange(port, "/health", None)
        await reader.read()
        writer.close()
        del waiting[me]
        health.append(time.monotonic() - begin)

    async def every_10_ms() -> None:
        asked = []
        while (now := time.monotonic()) < end:
            asked.append(asyncio.create_task(ask()))
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - now - 0.01)
        await asyncio.gather(*asked)

    async def stream(number: int) -> None:
        body = {
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        while time.monotonic() < end:
            data = json.dumps(body).encode()
            status, reader, writer = await exchange(port, "/v1/completions", data)
            if status != 200:
                failed.append(status)
                await asyncio.sleep(0.1)
                continue
            last = None
            async for line in reader:
                if line.startswith(b"data: "):
                    now = time.monotonic()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
                    waiting[number] = now, gaps
            waiting.pop(number, None)
            writer.close()

    measuring = [asyncio.create_task(each) for each in (every_10_ms(), *map(stream, range(STREAMS)))]
    await asyncio.wait(measuring, timeout=seconds + GRACE_S)
    for since, kind in waiting.values():  # what never came counts with the time it was waited for
        kind.append(time.monotonic() - since)
    for task in measuring:
        task.cancel()
    return {
        "health_p50": at(health, 0.5),
        "health_p99": at(health, 0.99),
        "health_max": at(health, 1),
        "gap_p50": at(gaps, 0.5),
        "gap_p99": at(gaps, 0.99),
        "gap_max": at(gaps, 1),
        "lag_p99": at(lags, 0.99),
        "lag_max": at(lags, 1),
        "health_count": len(health),
        "events": len(gaps),
        "streams_failed": len(failed),
    }


def at(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie, in milliseconds."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1000, 1)


@contextlib.contextmanager
def others(*roots: psutil.Process) -> Iterator[list[float]]:
    """The cores that were busy meanwhile, on average, for none of `roots`, what they started, and us. An
    intake worker that a body killed counts among these."""

    def spent() -> tuple[dict[psutil.Process, float], float]:
        ours = {}
        for process in (psutil.Process(), *roots, *(c for r in roots for c in r.children(True))):
            with contextlib.suppress(psutil.Error):
                ours[process] = sum(process.cpu_times()[:2])
        total = psutil.cpu_times()
        return ours, total.user + total.nice + total.system

    found: list[float] = []
    since, (ours, total) = time.monotonic(), spent()
    yield found
    ours_after, total_after = spent()
    own = sum(after - ours.get(process, 0.0) for process, after in ours_after.items())
    found.append(round((total_after - total - own) / (time.monotonic() - since), 2))


def memory(root: psutil.Process) -> dict[str, float]:
    """PSS of the gateway and of what it forked, in MB."""
    found: dict[str, float] = {}
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "gateway" in line or "bench.hostile" in line:
                depth = sum(parent.cmdline() == line for parent in process.parents())
                name = ("gateway", "forker")[depth] if depth < 2 else f"worker {process.pid}"
                found[name] = round(process.memory_full_info().pss / 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument("--http-only", action="store_true", help="without nodes and Redis")
    parser.add_argument("--be", choices=["attacker", "server"], help="be a process of ours")
    parser.add_argument("flags", nargs="*", help="for pdq serve")
    given = parser.parse_args()
    if given.be:
        asyncio.run(attack(given.port) if given.be == "attacker" else http_only())
        return
    result: dict[str, Any] = {"load_before": os.getloadavg()[0], "cores": os.cpu_count()}
    with contextlib.ExitStack() as stack:
        if given.http_only:
            root, port = stack.enter_context(served_http_only())
        else:
            root, port = stack.enter_context(served(given.port, given.flags)), given.port
        result["memory_idle_mb"] = memory(root)
        set_share_of_session(GO_FIRST)  # what we see late is not the server's
        with others(root) as found:
            result["quiet"] = asyncio.run(measure(port, given.seconds))
        result["quiet"]["others_cores"] = found[0]
        command = [sys.executable, "-m", "bench.hostile", "--be", "attacker", "--port", str(port)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as attacker:
            time.sleep(3)  # until its bodies are on their way
            with others(root, psutil.Process(attacker.pid)) as found:
                result["hostile"] = asyncio.run(measure(port, given.seconds))
            result["hostile"]["others_cores"] = found[0]
            result["memory_hostile_mb"] = memory(root)
            result["answers"] = json.loads(attacker.communicate(timeout=30)[0] or "{}")
    for name, value in result.items():
        print(name, json.dumps(value))
    if given.json:
        with open(given.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
