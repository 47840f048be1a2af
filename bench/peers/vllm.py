"""vLLM, one prefill and one decode server with KV over NIXL, as a measured system.

vLLM lives in a Python environment of its own, which a flag names; nothing of it is imported here.
A request takes two legs, as vLLM's own proxies do it: one token from the producer, whose answer
says where the KV lies, then everything from the consumer, which pulls the KV and computes the last
position of the prompt again (hence the first token too). The client itself makes both legs: no
proxy costs time. While other systems are measured, all its processes are stopped (SIGSTOP).

NIXL's progress thread polls without a pause, on the core that the worker computes on. vLLM has
no setting against it. `renice` gives that thread the least priority, by hand: the second row of
each table, and the one that a fair comparison looks at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from bench.peers.system import SERVED_NAME, Completion, Copies, Model, completion_body, token_times
from common.child_process import die_with_parent
from common.commands.bench.client import Client, Exchange

START_LIMIT_S, STOP_LIMIT_S = 240.0, 8.0
LEAST_PRIORITY = 19
BLOCK_SIZE = 128  # its default on CPU
SPINS_FROM = 0.2  # cores; what an idle server's other threads take is less than a hundredth
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "UCX_NET_DEVICES": "lo",
    "UCX_TLS": "tcp,sm,self",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
ASK_PREFILL: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def versions(python: Path) -> dict[str, str]:
    """Of what is installed where `python` is."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({n: m.version(n) for n in ('vllm', 'torch', 'nixl')}))"
    )
    reply = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(reply.stdout)
    return found


@dataclasses.dataclass(slots=True)
class _Server:
    role: str
    core: int
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> list[psutil.Process]:
        """The server and all that it started, and they started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []


class VllmPair:
    """The two servers: `with VllmPair(…) as pair`. Asleep until a `Vllm` wakes them."""

    def __init__(self, python: Path, model: Model, folder: Path, cores: Sequence[int]) -> None:
        self._python, self._model, self._folder = python, model, folder
        self._cores = cores
        self.servers: dict[str, _Server] = {}
        self.prompt_tokens = 0  # by either of those that wake it

    def __enter__(self) -> VllmPair:
        try:
            for role, core in zip(("kv_producer", "kv_consumer"), self._cores, strict=True):
                self.servers[role] = self._start(role, core)
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        self.signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self, role: str, core: int) -> _Server:
        port, side_channel = _free_port(), _free_port()
        transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        command = [
            str(self._python),
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(self._model.folder),
            "--served-model-name",
            SERVED_NAME,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "bfloat16",
            "--load-format",
            "dummy",
            "--max-model-len",
            "4096",
            "--block-size",
            str(BLOCK_SIZE),
            "--num-gpu-blocks-override",
            str(self._model.pool_tokens // BLOCK_SIZE),
            "--enforce-eager",
            "--kv-transfer-config",
            json.dumps(transfer),
        ]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
            "PATH": f"{self._python.parent}:{os.environ.get('PATH', '')}",
        }
        log = self._folder / f"vllm-{role}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=die_with_parent(os.getpid()),
            )
        return _Server(role, core, f"http://127.0.0.1:{port}", process, log)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        waiting = list(self.servers.values())
        while waiting:
            for server in waiting:
                if server.process.poll() is not None or time.monotonic() > deadline:
                    last = "\n".join(server.log.read_text(errors="replace").splitlines()[-20:])
                    raise SystemExit(f"vLLM's {server.role} did not come up:\n{last}")
            waiting = [server for server in waiting if not _healthy(server.url)]
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        return [process for server in self.servers.values() for process in server.family()]

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _end(self) -> None:
        self.signal(signal.SIGCONT)
        everyone = self.processes()
        for server in self.servers.values():
            server.process.terminate()
        _, left = psutil.wait_procs(everyone, STOP_LIMIT_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for server in self.servers.values():
            server.process.wait()

    def spinning_threads(self) -> list[int]:
        """Threads of the idle servers that take CPU nevertheless."""
        processes, seconds = self.processes(), 1.0
        before = {t.id: t.user_time + t.system_time for p in processes for t in p.threads()}
        time.sleep(seconds)
        after = {t.id: t.user_time + t.system_time for p in processes for t in p.threads()}
        return [
            thread for thread, used in after.items() if used - before.get(thread, used) > SPINS_FROM * seconds
        ]


class Vllm:
    """Implements `System`: the pair as it comes, or with its spinning threads at the least priority.
    Both use the same processes, and take turns."""

    def __init__(self, pair: VllmPair, *, reniced: bool) -> None:
        self.name = "vLLM, reniced" if reniced else "vLLM"
        self._pair = pair
        self._reniced = reniced
        self._producer = Client(pair.servers["kv_producer"].url, "", 120.0)
        self._consumer = Client(pair.servers["kv_consumer"].url, "", 120.0)
        self._copied = 0, 0.0, 0

    @property
    def prompt_tokens(self) -> int:
        return self._pair.prompt_tokens

    def processes(self) -> list[psutil.Process]:
        return self._pair.processes()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        pair = self._pair
        pair.signal(signal.SIGCONT)
        try:
            self._set_priorities(pair.spinning_threads())
            self._copied = self._copied_so_far()
            yield
        finally:
            pair.signal(signal.SIGSTOP)

    def _set_priorities(self, spinning: Sequence[int]) -> None:
        if self._reniced and not spinning:
            raise RuntimeError("no thread of vLLM spins: there is nothing to renice")
        wanted = LEAST_PRIORITY if self._reniced else 0
        for thread in spinning:
            if os.getpriority(os.PRIO_PROCESS, thread) != wanted:
                try:
                    os.setpriority(os.PRIO_PROCESS, thread, wanted)
                except PermissionError as error:
                    raise SystemExit(
                        "to raise a priority again needs CAP_SYS_NICE: measure `vllm` and "
                        "`vllm-reniced` in two commands (--systems)"
                    ) from error

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        body = completion_body(prompt, 1, stream=False) | {"kv_transfer_params": ASK_PREFILL}
        one = await self._producer.exchange(self._producer.encode(body))
        place = _json_body(one).get("kv_transfer_params")
        if not place:
            raise RuntimeError("vLLM's producer does not say where the KV lies")
        body = completion_body(prompt, max_tokens, stream=True) | {"kv_transfer_params": place}
        two = await self._consumer.exchange(self._consumer.encode(body))
        self._pair.prompt_tokens += len(prompt)
        times = token_times(two, max_tokens)
        return Completion(one.sent_at, one.pieces[-1][0], times, times)

    async def copies(self, prompt_len: int) -> Copies:
        before = self._copied
        self._copied = self._copied_so_far()
        transfers, seconds, num_bytes = (now - then for now, then in zip(self._copied, before, strict=True))
        if transfers != 1:
            raise RuntimeError(f"vLLM pulled the KV of {transfers} prompts instead of one")
        return Copies(seconds, seconds, int(num_bytes))

    def _copied_so_far(self) -> tuple[int, float, int]:
        """Transfers, seconds and bytes of the consumer's life, as its `/metrics` says."""
        url = self._pair.servers["kv_consumer"].url + "/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found = {
            line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm:nixl_")
        }
        return (
            int(found["vllm:nixl_xfer_time_seconds_count"]),
            found["vllm:nixl_xfer_time_seconds_sum"],
            int(found["vllm:nixl_bytes_transferred_sum"]),
        )


def _json_body(exchange: Exchange) -> dict[str, object]:
    raw = b"".join(data for _, data in exchange.pieces)
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"vLLM: {exchange.failure or raw[:500].decode(errors='replace')}")
    found: dict[str, object] = json.loads(body)
    return found


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
