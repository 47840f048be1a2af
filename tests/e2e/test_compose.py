"""docker-compose.yml on a real engine: built, started, scaled, killed, looked into, taken down."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from common.engine import Completion, Engine
from tests.support.docker import ROOT, Ahead, Compose, NoEngine
from tests.support.load import Load, bodies, truth
from tests.support.readme import marked
from tests.support.redis import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

MODEL = "pdq-5m"
ASKED = bodies(24, max_tokens=(20, 120))


@pytest.fixture(scope="module")
def system(docker_ahead: Ahead) -> Iterator[Compose]:
    """One prefill and one decode node, in containers; nothing of it is left at the end."""
    with contextlib.closing(docker_ahead):
        try:
            compose = docker_ahead.compose()
        except NoEngine as reason:
            pytest.skip(str(reason))
        compose.up()
        compose.wait_ready(gateway=1, prefill=1, decode=1)
        yield compose


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(threads=1, num_kv_blocks=1024)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[list[Completion]]:
    return truth(engine, ASKED)


def sent(model: str = MODEL) -> list[dict[str, Any]]:
    return [{"model": model, **body} for body in ASKED]


def transports(nodes: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """(sending, receiving node) → the transport between them, from what the senders say."""
    return {
        (node["incarnation"], link["peer"]): link["transport"]
        for node in nodes
        for link in node["kv_links"]
        if link["direction"] == "sends"
    }


def test_nobody_in_a_container_is_root_or_could_compile(system: Compose) -> None:
    for service in ("gateway", "prefill", "decode"):
        assert system.inside(service, "id", "-u").strip() == "10001"
        found = system.inside(service, "sh", "-c", "command -v cc gcc g++ make clang || true")
        assert not found.strip()
    assert system.inside("decode", "stat", "-c", "%a %u", "/run/pdq/bus.key").split() == ["600", "10001"]


async def test_the_tokens_are_the_engines_and_blocks_go_by_shared_memory(
    system: Compose, engine: Engine, expected: list[list[Completion]]
) -> None:
    nodes = system.wait_ready(gateway=1, prefill=1, decode=1)
    numerics = {node["numerics"] for node in nodes if node["role"] != "gateway"}
    assert numerics == {engine.fingerprint.numerics}
    async with Load(system.url, sent()) as load:
        await load.finish(expected)
    found = transports(system.wait_ready(gateway=1, prefill=1, decode=1))
    assert list(found.values()) == ["shm"], system.nodes()
    print(system.inside("gateway", "pdq", "nodes"))


async def test_it_is_scaled_while_it_runs(system: Compose, expected: list[list[Completion]]) -> None:
    script = ROOT / "deploy" / "examples" / "scale_and_watch.sh"
    async with Load(system.url, sent()) as load:
        said = await asyncio.to_thread(system.script, str(script), "2", "2")
        await load.finish(expected)
    print(said)
    nodes = system.wait_ready(gateway=1, prefill=2, decode=2)
    pairs = {
        (p["incarnation"], d["incarnation"])
        for p in nodes
        if p["role"] == "prefill"
        for d in nodes
        if d["role"] == "decode"
    }
    deadline = time.monotonic() + 120
    found: dict[tuple[str, str], str] = {}
    while found.keys() != pairs:  # until every prefill node has sent to every decode node
        assert time.monotonic() < deadline, (found, pairs)
        async with Load(system.url, sent()) as load:
            await load.finish(expected)
        found = transports(system.wait_ready(gateway=1, prefill=2, decode=2))
    assert set(found.values()) == {"shm"}, system.nodes()
    print(system.inside("gateway", "pdq", "nodes"))


@pytest.mark.parametrize("service", ["decode", "prefill"])
async def test_a_container_that_is_killed_under_load_costs_no_request(
    system: Compose, expected: list[list[Completion]], service: str
) -> None:
    system.up("--no-recreate", "--scale", "prefill=2", "--scale", "decode=2")
    system.wait_ready(gateway=1, prefill=2, decode=2)
    async with Load(system.url, sent()) as load:
        await wait_until(lambda: load.num_begun >= 3, "some streams run")
        system.engine.run("kill", system.containers(service)[0])
        await load.finish(expected)


async def test_the_queue_is_read_with_redis_cli(system: Compose, expected: list[list[Completion]]) -> None:
    system.up("--no-recreate", "--scale", "prefill=1", "--scale", "decode=1")
    (node,) = [n for n in system.wait_ready(prefill=1, decode=1) if n["role"] == "prefill"]
    stream = f"pdq:stream:{node['incarnation']}"

    def cli(*command: str) -> str:
        return system.inside("redis", "redis-cli", *command)

    assert cli("config", "get", "appendonly").split() == ["appendonly", "yes"]
    assert stream in cli("--scan", "--pattern", "pdq:*").split()
    # Entries stay until their prompts are computed: a moment, so it is looked for in a loop.
    look = (
        f'until [ "$(redis-cli xlen {stream})" -gt 0 ]; do :; done; redis-cli --no-raw xinfo stream {stream}'
    )
    looking = asyncio.create_task(
        asyncio.to_thread(system.inside, "redis", "timeout", "120", "sh", "-c", look)
    )
    while not looking.done():
        async with Load(system.url, sent()) as load:
            await load.finish(expected)
    said = await looking
    print(said[:400])
    assert "last-generated-id" in said


@pytest.fixture
def pretending(system: Compose, tmp_path: Path) -> list[str]:
    """Flags of compose for a file in which the gpu services are as in the project's own, but that they run
    the image without CUDA, on two GPUs that are not there."""
    config = system.config("gpu")
    for name in ("prefill-gpu", "decode-gpu"):
        service = config["services"][name]
        for key in ("build", "deploy", "profiles"):
            service.pop(key, None)
        service["image"] = system.variables["IMAGE"]
        service["command"] = ["python", "-m", "tests.support.pretended_gpus", "2", *service["command"][3:]]
        service["volumes"].append(f"{ROOT}/tests:/home/pdq/tests:ro")
        service["environment"]["PDQ_THREADS"] = "1"
    path = tmp_path / "pretending.yml"
    path.write_text(yaml.safe_dump(config))
    return ["--file", str(path), "--project-directory", str(ROOT)]


async def test_replicas_take_a_gpu_each_and_that_of_one_that_was_killed(
    system: Compose, pretending: list[str]
) -> None:
    system.up("--no-recreate", "--scale", "prefill=0", "--scale", "decode=0")

    def scale(**counts: int) -> None:
        flags = [flag for name, count in counts.items() for flag in ("--scale", f"{name}-gpu={count}")]
        services = [f"{name}-gpu" for name in counts]
        system.compose(*pretending, "up", "--detach", "--no-deps", "--no-recreate", *flags, *services)

    try:
        scale(prefill=1, decode=1)
        nodes = system.wait_ready(gateway=1, prefill=1, decode=1)
        on_gpus = {node["role"]: node for node in nodes if node["role"] != "gateway"}
        assert {node["gpu"] for node in on_gpus.values()} == {"GPU-0000", "GPU-0001"}
        assert {node["device"] for node in on_gpus.values()} == {"cuda:0", "cuda:1"}
        (first,) = system.compose(*pretending, "ps", "--quiet", "decode-gpu").split()
        scale(decode=2)
        (other,) = {*system.compose(*pretending, "ps", "--quiet", "decode-gpu").split()} - {first}

        def refused() -> bool:
            return "no GPU is left: all 2 GPUs are held" in system.engine.run_all("logs", other)

        await wait_until(refused, "the third has said who has them")
        system.engine.run("kill", first)
        gpu, known = on_gpus["decode"]["gpu"], on_gpus["decode"]["incarnation"]

        def taken() -> bool:
            return any(node["gpu"] == gpu and node["incarnation"] != known for node in system.nodes())

        await wait_until(taken, "its GPU is the third one's", 120.0)
    finally:
        system.compose(*pretending, "rm", "--stop", "--force", "prefill-gpu", "decode-gpu")
        system.up("--no-recreate", "--scale", "prefill=1", "--scale", "decode=1")


def test_the_readmes_commands_work(system: Compose) -> None:
    for block in marked("docker"):
        for command in block.commands:
            if "down --volumes" not in command:  # which the end of the module does
                assert system.script("sh", "-c", command.replace("docker compose", "$COMPOSE"))
    system.wait_ready(gateway=1, prefill=2, decode=2)


def test_another_model_is_one_variable(system: Compose) -> None:
    system.up(MODEL="/models/pdq-5m-draft")
    system.wait_ready(gateway=1, prefill=1, decode=1)
    body = {"prompt": "Once upon a time", "max_tokens": 8}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=60.0).json()
    assert answer["model"] == "pdq-5m-draft", answer
    assert answer["usage"]["completion_tokens"] > 0
