"""`pdq serve` and the commands that look at it, with the model that ships: real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from common.errors import ConfigError
from common.processor_share import BESIDE_GATEWAY
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.server import EmbeddedRedis
from tests.support.redis import HANGS_S
from tests.support.serve_process import ServeProcess, serving, wait_until

SMALL = ("--port", "0", "--num-kv-blocks", "256")
UNIFIED = (*SMALL, "--unified", "1")


# ── One deployment for those that only look ──────────────────────────────────────────────────────


def test_every_part_is_announced_with_its_state(served: ServeProcess) -> None:
    served.line(r"^redis +ready +(valkey|redis) \d+\S* (carried by|on the PATH)")
    for part in ("gateway-1", "prefill-1", "decode-1"):
        served.line(rf"^{part} +starting +pid \d+, cores? [\d,-]+$")
        served.line(rf"^{part} +ready ")


def test_the_curl_line_works_as_it_is(served: ServeProcess) -> None:
    line = served.line("^curl .*").group()
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30, check=True)
        answer = json.loads(done.stdout)
    else:
        url, _, header, _, body = shlex.split(line)[1:]
        name, _, value = header.partition(": ")
        answer = httpx.post(url, headers={name: value}, content=body, timeout=30).json()
    assert answer["model"] == "pdq-5m"
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["text"]


def test_each_node_keeps_to_its_share_of_the_cores(served: ServeProcess) -> None:
    shares = [psutil.Process(served.pid_of(part)).cpu_affinity() for part in ("prefill-1", "decode-1")]
    mine = os.sched_getaffinity(0)
    if len(mine) >= 2:
        assert not set(shares[0]) & set(shares[1])
        assert len(shares[0]) == len(shares[1])
    assert set(shares[0]) | set(shares[1]) <= mine


def test_its_processes_share_a_session_in_which_the_gateway_goes_before_the_nodes(
    served: ServeProcess,
) -> None:
    """Where each has a session of its own, Linux lets a gateway wait 140 ms at a time for a node that
    computes all the time, whatever their niceness."""
    gateway, *nodes = (psutil.Process(served.pid_of(part)) for part in ("gateway-1", "prefill-1", "decode-1"))
    redis = [
        c
        for c in psutil.Process(served.process.pid).children()
        if c.pid not in (gateway.pid, *(node.pid for node in nodes))
    ]
    parts = [gateway, *nodes, *redis]
    assert {os.getsid(part.pid) for part in parts} == {os.getsid(served.process.pid)}
    assert all(node.nice() == min(gateway.nice() + BESIDE_GATEWAY, 19) for node in nodes)
    # A Ctrl-C in the terminal is for the command alone.
    assert all(os.getpgid(part.pid) == part.pid for part in parts)


def test_the_tables_find_the_running_deployment(served: ServeProcess) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True, "temperature": 0}
    answer = httpx.post(f"{served.url()}/v1/completions", json=body, timeout=30).json()

    nodes = {node["name"]: node for node in served.pdq_json("nodes")}
    assert {name: node["role"] for name, node in nodes.items()} == {
        "prefill-1": "prefill",
        "decode-1": "decode",
        "gateway-1": "gateway",
    }
    assert all(node["state"] == "ready" for node in nodes.values())
    assert all(node["pid"] == served.pid_of(name) for name, node in nodes.items())
    assert nodes["decode-1"]["num_blocks"] == 256

    queues = {node["name"]: node for node in served.pdq_json("queue")}
    assert set(queues) == {"prefill-1", "decode-1"}
    assert all(node["waiting"] == 0 for node in queues.values())

    def finished() -> bool:
        records = {record["request"]: record for record in served.pdq_json("requests")}
        return bool(records.get(answer["id"], {}).get("state") == "finished")

    wait_until(finished, "the request is recorded as finished")
    (record,) = [r for r in served.pdq_json("requests") if r["request"] == answer["id"]]
    assert record["choices"][0]["generated"] == 5
    assert record["choices"][0]["prefill_node"].startswith("prefill-1-")
    assert record["choices"][0]["decode_node"].startswith("decode-1-")

    for table, word in (("nodes", "decode-1"), ("queue", "prefill-1"), ("requests", answer["id"])):
        header, *rows = served.pdq(table).splitlines()
        assert header.isupper()
        assert any(word in row and "redis://" not in row for row in rows)


def test_the_load_client_measures_it(served: ServeProcess, tmp_path: Path) -> None:
    report, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    said = served.pdq(
        "bench",
        "--requests",
        "12",
        "--rate",
        "20",
        "--prompt-len",
        "40",
        "--output-len",
        "12",
        "--ignore-eos",
        "--ttft-slo",
        "60",
        "--tpot-slo",
        "60",
        "--json",
        str(report),
        "--plot",
        str(picture),
    )
    assert "goodput" in said
    assert "TTFT" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(report.read_text())
    summary = result["summary"]
    assert (summary["succeeded"], summary["failed"]) == (12, 0)
    assert summary["output_tokens"] == 12 * 12
    assert summary["prompt_tokens"] == 12 * 40
    assert summary["goodput"]["share"] == 1.0
    assert 0 < summary["ttft_s"]["p50"] <= summary["e2e_s"]["p50"]
    assert summary["ttft_s"]["p50"] <= summary["ttft_s"]["p99"]
    uses = {use["name"]: use for use in result["processes"]}
    assert set(uses) == {"gateway-1", "prefill-1", "decode-1", "redis", "serve"}
    assert all(use["rss_bytes"] >= (use["pss_bytes"] or 0) > 0 for use in uses.values())


def test_a_node_that_is_killed_comes_back(served: ServeProcess) -> None:
    url = served.url()
    os.kill(served.pid_of("decode-1"), signal.SIGKILL)
    served.line(r"^decode-1 +died +killed by SIGKILL; starts again in ")
    served.line(r"^decode-1 +ready ", count=2)
    served.look()
    body = {"prompt": "Once upon a time", "max_tokens": 5}
    wait_until(
        lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200,
        "it serves again",
    )


# ── Stopping ─────────────────────────────────────────────────────────────────────────────────────


def test_ctrl_c_finishes_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, *UNIFIED) as serve:
        with _open_stream(serve.url(), max_tokens=120) as events:
            next(events)
            serve.signal(signal.SIGINT)
            rest = list(events)
        assert serve.end() == 0
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    stopped = [line.split()[0] for line in serve.lines if line.split()[1:2] == ["stopped"]]
    assert stopped == ["gateway-1", "unified-1", "redis"]
    assert not [line for line in serve.errors if "Traceback" in line or "ERROR" in line]
    serve.assert_nothing_left()


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, *UNIFIED) as serve:
        url = serve.url()
        os.kill(serve.pid_of("unified-1"), signal.SIGSTOP)  # so that the drain cannot end by itself
        stream = threading.Thread(target=_read_whatever_comes, args=(url,))
        stream.start()
        wait_until(
            lambda: any(n["running"] for n in serve.pdq_json("nodes") if n["role"] == "gateway"),
            "the request is open",
        )
        serve.signal(signal.SIGINT)
        serve.line("^pdq +stopping ")
        serve.signal(signal.SIGINT)
        assert serve.end(limit_s=20.0) == 130  # a drain would take 30
        stream.join(HANGS_S)
        assert not stream.is_alive()
    serve.assert_nothing_left()


def test_kill_9_of_the_command_leaves_no_process(tmp_path: Path) -> None:
    with serving(tmp_path, *UNIFIED) as serve:
        serve.url()
        serve.signal(signal.SIGKILL)
        assert serve.end() == -signal.SIGKILL
        _, alive = psutil.wait_procs(list(serve.children.values()), timeout=HANGS_S)
        assert not alive
    # Its note stays behind, and counts for nothing.
    found = subprocess.run(
        [*serve.process.args[:5], "nodes"],
        cwd=serve.folder,  # type: ignore[index]
        env={**serve.environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert found.returncode == 1
    assert "no `pdq serve` of this user is running" in found.stderr
    assert not list(serve.notes.rglob("*.json"))


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, *UNIFIED) as serve:
        serve.line(r"^unified-1 +starting")
        serve.look()
        serve.signal(signal.SIGINT)
        assert serve.end() == 0
    serve.assert_nothing_left()


# ── What keeps it from starting is one line ──────────────────────────────────────────────────────


def _refusal(folder: Path, *flags: str, **variables: str) -> str:
    """The one line of a `pdq serve` that ends with exit code 1 and leaves nothing."""
    with serving(folder, *flags, variables=variables) as serve:
        assert serve.end(limit_s=120) == 1
    serve.assert_nothing_left()
    (line,) = serve.errors
    return line


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = _refusal(tmp_path, "--port", str(port))
    assert line == f"pdq serve: port {port} of 127.0.0.1 is taken; --port names another"


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    line = _refusal(tmp_path, str(tmp_path / "nothing"), "--port", "0")
    assert line == f"pdq serve: model folder {tmp_path}/nothing does not exist"


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    line = _refusal(tmp_path, "--model", str(tmp_path), "--port", "0")
    assert line == f"pdq serve: {tmp_path} holds no model: config.json is missing"


def test_an_unreachable_redis_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = "redis://:hunter2@127.0.0.1:1/0"
    line = _refusal(tmp_path, "--port", "0", "--redis-retry-s", "0.1", PDQ_REDIS_URL=url)
    assert line.startswith("pdq serve: Redis cannot be reached")
    assert "hunter2" not in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_without_keys_is_one_line(tmp_path: Path, host: str) -> None:
    line = _refusal(tmp_path, "--port", "0", "--host", host)
    assert line.startswith(f"pdq serve: without API keys only loopback can be listened on, not {host!r}")
    assert "--api-key-file" in line


def test_a_secret_on_the_command_line_is_one_line_without_it(tmp_path: Path) -> None:
    line = _refusal(tmp_path, "--api-key", "tops3cret")
    assert "PDQ_API_KEYS" in line
    assert "tops3cret" not in line


def test_a_file_of_keys_that_others_can_read_is_one_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-one")
    keys.chmod(0o644)
    line = _refusal(tmp_path, "--api-key-file", str(keys))
    assert line == (
        f"pdq serve: the file of API keys {keys} can be read or written by others: chmod 600 {keys}"
    )


def test_a_node_that_dies_at_start_is_one_line_that_says_why(tmp_path: Path) -> None:
    line = _refusal(tmp_path, *UNIFIED, "--max-model-len", "1000000")
    assert line.startswith("pdq serve: unified-1 died at start (exit code 1): ")
    assert "max_model_len 1000000 is beyond the model's 2048 positions" in line


def test_a_pool_that_does_not_fit_is_one_line_that_says_what_to_lower(tmp_path: Path) -> None:
    line = _refusal(tmp_path, "--port", "0", "--unified", "1", "--num-kv-blocks", "1000000000")
    assert line.startswith("pdq serve: unified-1 died at start (exit code 1): ")
    assert "MiB of free memory; lower --num-kv-blocks or --kv-cache-memory-bytes" in line


def test_a_node_that_keeps_dying_ends_it(tmp_path: Path) -> None:
    with serving(tmp_path, *UNIFIED) as serve:
        serve.url()
        for life in range(1, 5):
            serve.line(r"^unified-1 +starting ", count=life)
            os.kill(serve.pid_of("unified-1"), signal.SIGKILL)
            if life < 4:
                serve.line(r"^unified-1 +died +killed by SIGKILL; starts again", count=life)
        assert serve.end() == 1
    (line,) = [line for line in serve.errors if line.startswith("pdq serve:")]
    assert line.startswith("pdq serve: unified-1 died at start 3 times in a row (killed by SIGKILL)")
    serve.assert_nothing_left()


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────


def test_a_redis_of_its_own_has_a_password_that_only_its_user_can_find(served: ServeProcess) -> None:
    (note,) = served.notes.rglob("*.json")
    assert note.stat().st_mode & 0o077 == 0
    url = json.loads(note.read_text())["redis_url"]
    stranger = f"redis://127.0.0.1:{urlsplit(url).port}/0"
    asyncio.run(_refused(stranger))
    _assert_hidden(served, [urlsplit(url).password or ""])


def test_secrets_that_are_given_are_shown_nowhere(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis())
        keys = tmp_path / "keys"
        keys.write_text("sk-in-a-file\n")
        keys.chmod(0o600)
        given = {"PDQ_REDIS_URL": redis.url, "PDQ_API_KEYS": "sk-in-a-variable"}
        flags = (*UNIFIED, "--api-key-file", str(keys), "--log-level", "debug")
        serve = stack.enter_context(serving(tmp_path, *flags, variables=given))
        url = serve.url()
        serve.line(r"^redis +ready +(valkey|redis) \S+, given, at 127\.0\.0\.1:\d+$")
        body = {"prompt": "Once upon a time", "max_tokens": 5}
        for key, status in (("sk-in-a-file", 200), ("sk-in-a-variable", 200), ("none", 401)):
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
            assert answer.status_code == status
        secrets = [urlsplit(redis.url).password or "", "sk-in-a-file", "sk-in-a-variable"]
        _assert_hidden(serve, secrets)
        serve.signal(signal.SIGINT)
        assert serve.end() == 0
        serve.assert_nothing_left()


def _assert_hidden(serve: ServeProcess, secrets: list[str]) -> None:
    """None of them in what the system prints, logs or tells, nor where `ps` looks."""
    serve.look()
    commands = []
    for process in (psutil.Process(serve.process.pid), *serve.children.values()):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has done its work
            commands.append(str(process.cmdline()))
    told = [serve.output, *commands]
    told += [serve.pdq(table) for table in ("nodes", "queue", "requests")]
    told += [str(serve.pdq_json(table)) for table in ("nodes", "queue", "requests")]
    assert len(commands) >= 4  # pdq serve, a gateway and two nodes
    for secret in secrets:
        assert secret
        assert not [text for text in told if secret in text]


async def _refused(url: str) -> None:
    client = RedisClient(RedisSettings(url=url))
    with pytest.raises(ConfigError, match="Redis refuses the credentials"):
        await client.open()
    await client.close()


# ── Helpers ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _open_stream(url: str, max_tokens: int) -> Iterator[Iterator[str]]:
    body = {"prompt": "Once upon a time", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        yield (line for line in response.iter_lines() if line)


def _read_whatever_comes(url: str) -> None:
    with contextlib.suppress(httpx.HTTPError, AssertionError), _open_stream(url, 50) as events:
        list(events)
