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
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from bench.peers.process import ServerProcess, free_port, wait_healthy
from bench.peers.system import SERVED_NAME, Completion, Copies, Model, completion_body, token_times
from common.commands.bench.client import Client, Exchange

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


class VllmServer(ServerProcess):
    """One server on `cores`, with `flags` beside what every server of vLLM gets here."""

    def __init__(
        self,
        name: str,
        python: Path,
        model: Model,
        folder: Path,
        cores: Sequence[int],
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        arguments = [
            "vllm.entrypoints.cli.main",
            "serve",
            str(model.folder),
            "--served-model-name",
            SERVED_NAME,
            "--dtype",
            "bfloat16",
            "--load-format",
            "dummy",
            "--max-model-len",
            "4096",
            "--block-size",
            str(BLOCK_SIZE),
            "--num-gpu-blocks-override",
            str(model.pool_tokens // BLOCK_SIZE),
            *flags,
        ]
        bound = {
            "VLLM_CPU_OMP_THREADS_BIND": f"{min(cores)}-{max(cores)}" if len(cores) > 1 else str(cores[0])
        }
        super().__init__(name, python, arguments, ENVIRONMENT | bound | dict(environment or {}), folder)


class VllmPair:
    """The two servers: `with VllmPair(…) as pair`. Asleep until a `Vllm` wakes them."""

    def __init__(self, python: Path, model: Model, folder: Path, cores: Sequence[int]) -> None:
        self._python, self._model, self._folder = python, model, folder
        self._cores = cores
        self.servers: dict[str, ServerProcess] = {}
        self.prompt_tokens = 0  # by either of those that wake it

    def __enter__(self) -> VllmPair:
        try:
            for role, core in zip(("kv_producer", "kv_consumer"), self._cores, strict=True):
                self.servers[role] = self._start(role, core)
            wait_healthy(list(self.servers.values()))
        except BaseException:
            self._end()
            raise
        self.signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self, role: str, core: int) -> ServerProcess:
        transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        return VllmServer(
            f"vllm-{role}",
            self._python,
            self._model,
            self._folder,
            [core],
            ["--enforce-eager", "--kv-transfer-config", json.dumps(transfer)],
            {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
        )

    def processes(self) -> list[psutil.Process]:
        return [process for server in self.servers.values() for process in server.family()]

    def signal(self, number: signal.Signals) -> None:
        for server in self.servers.values():
            server.signal(number)

    def _end(self) -> None:
        for server in self.servers.values():
            server.end()

    def set_priorities(self, priority: int) -> None:
        """Of the threads that spin. `SystemExit` where raising one again is not allowed."""
        for thread in self.spinning_threads():
            if os.getpriority(os.PRIO_PROCESS, thread) != priority:
                try:
                    os.setpriority(os.PRIO_PROCESS, thread, priority)
                except PermissionError as error:
                    raise SystemExit(
                        "to raise a priority again needs CAP_SYS_NICE: measure vLLM as it comes and "
                        "reniced in two commands (--systems)"
                    ) from error

    def spinning_threads(self) -> list[int]:
        """Threads of the idle servers that take CPU nevertheless; `RuntimeError` if there are none."""
        processes, seconds = self.processes(), 1.0
        before = {t.id: t.user_time + t.system_time for p in processes for t in p.threads()}
        time.sleep(seconds)
        after = {t.id: t.user_time + t.system_time for p in processes for t in p.threads()}
        spinning = [
            thread for thread, used in after.items() if used - before.get(thread, used) > SPINS_FROM * seconds
        ]
        if not spinning:
            raise RuntimeError("no thread of vLLM spins: there is nothing to renice")
        return spinning

    @contextlib.contextmanager
    def awake(self, *, reniced: bool) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            self.set_priorities(LEAST_PRIORITY if reniced else 0)
            yield
        finally:
            self.signal(signal.SIGSTOP)


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
        with self._pair.awake(reniced=self._reniced):
            self._copied = self._copied_so_far()
            yield

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        one = await self._producer.exchange(self._producer.encode(first_leg(prompt)))
        body = completion_body(prompt, max_tokens, stream=True) | {"kv_transfer_params": place_of_kv(one)}
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


def first_leg(prompt: Sequence[int]) -> dict[str, object]:
    """What the producer is asked."""
    return completion_body(prompt, 1, stream=False) | {"kv_transfer_params": ASK_PREFILL}


def place_of_kv(exchange: Exchange) -> object:
    """What the producer answered; `RuntimeError` where it did not."""
    raw = b"".join(data for _, data in exchange.pieces)
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"vLLM: {exchange.failure or raw[:500].decode(errors='replace')}")
    place: object = json.loads(body).get("kv_transfer_params")
    if not place:
        raise RuntimeError("vLLM's producer does not say where the KV lies")
    return place
