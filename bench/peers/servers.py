"""Whole servers over HTTP as the loads meet them: ours and those of peers, one protocol for all.

Owns how each is started, put to sleep and asked. Two cores for each: a unified server computes on both, a
prefill and a decode server on one each. Peers sleep by SIGSTOP while another is measured; ours are ended and
started again, because nodes that a pause makes late would take each other for dead.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from bench.peers.process import ServerProcess, free_port, wait_healthy
from bench.peers.system import SERVED_NAME, Model, completion_body
from bench.peers.vllm import VllmPair, VllmServer, first_leg, place_of_kv
from bench.served import served
from common.commands.bench.client import Client, Exchange

TIMEOUT_S = 300.0  # of a request
OUR_BLOCK_SIZE = 16
TRANSFORMERS_BLOCK_SIZE = 64


class Server(Protocol):
    """A system that answers completions."""

    name: str  # as the tables show it

    def awake(self) -> AbstractContextManager[None]:
        """Within it the system serves; outside of it it takes no CPU."""

    async def stream(self, prompt: Sequence[int], max_tokens: int, result: Exchange) -> None:
        """Greedy, and on beyond the end of sequence, into `result`, whose `sent_at` is set; also what goes
        wrong is there, as `read` understands it."""


class Unified:
    """Of any engine: one server, one request."""

    name = ""
    _client: Client

    async def stream(self, prompt: Sequence[int], max_tokens: int, result: Exchange) -> None:
        await self._client.exchange(self._client.encode(self._body(prompt, max_tokens)), result)

    def _body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, object]:
        return completion_body(prompt, max_tokens, stream=True)


class Pdq(Unified):
    """`pdq serve`, unified or with a prefill and a decode node: one request to its gateway either way."""

    def __init__(self, model: Model, cores: Sequence[int], *, disaggregated: bool) -> None:
        self.name = "pdq 1P1D" if disaggregated else "pdq"
        self._nodes = ("--prefill", "1", "--decode", "1") if disaggregated else ("--unified", "1")
        self._flags = [
            *("--model", str(model.folder), "--served-model-name", SERVED_NAME),
            *("--dtype", "bfloat16", "--load-format", model.load_format),
            *("--block-size", str(OUR_BLOCK_SIZE)),
            *("--num-kv-blocks", str(model.pool_tokens // OUR_BLOCK_SIZE)),
            *("--cores", ",".join(map(str, cores))),
        ]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        port = free_port()
        with served(port, self._flags, self._nodes):
            self._client = Client(f"http://127.0.0.1:{port}", "", TIMEOUT_S)
            yield


class Peer(Unified):
    """One server of another engine, asleep until it is woken."""

    def __init__(self, name: str, server: ServerProcess) -> None:
        self.name = name
        self._server = server
        self._client = Client(server.url, "", TIMEOUT_S)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self._server.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._server.signal(signal.SIGSTOP)


class Transformers(Peer):
    """Its server takes text only (a word is a token, here), names a model by its folder, and knows no
    `ignore_eos`: random weights come upon the one token among 32,000 too rarely to matter."""

    def __init__(self, server: ServerProcess, model: Model) -> None:
        super().__init__("transformers", server)
        self._folder = str(model.folder)

    def _body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, object]:
        text = " ".join(f"w{token}" for token in prompt)
        return {
            "model": self._folder,
            "prompt": text,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
        }


class Pair:
    """vLLM's prefill and decode servers: the client makes both legs of a request itself, so that no proxy
    costs time. Both ways of renicing use the same processes, and take turns."""

    def __init__(self, pair: VllmPair, *, reniced: bool) -> None:
        self.name = "vLLM 1P1D reniced" if reniced else "vLLM 1P1D"
        self._pair, self._reniced = pair, reniced
        self._producer, self._consumer = (
            Client(pair.servers[role].url, "", TIMEOUT_S) for role in ("kv_producer", "kv_consumer")
        )

    def awake(self) -> AbstractContextManager[None]:
        return self._pair.awake(reniced=self._reniced)

    async def stream(self, prompt: Sequence[int], max_tokens: int, result: Exchange) -> None:
        first = await self._producer.exchange(self._producer.encode(first_leg(prompt)))
        try:
            place = place_of_kv(first)
        except RuntimeError:
            result.pieces, result.ended_at, result.failure = first.pieces, first.ended_at, first.failure
            return
        body = completion_body(prompt, max_tokens, stream=True) | {"kv_transfer_params": place}
        await self._consumer.exchange(self._consumer.encode(body), result)


# ── Starting them ────────────────────────────────────────────────────────────────────────────────

PEERS = ("vllm", "transformers")
OURS = ("pdq", "pdq-1p1d")
SYSTEMS = {"vllm": ("vllm", "vllm-1p1d", "vllm-1p1d-reniced"), "transformers": ("transformers",)}
"""Of each peer, those that its environment can run."""
SHOWN = {
    "pdq": "pdq",
    "pdq-1p1d": "pdq 1P1D",
    "vllm": "vLLM",
    "transformers": "transformers",
    "vllm-1p1d": "vLLM 1P1D",
    "vllm-1p1d-reniced": "vLLM 1P1D reniced",
}
"""Name on the command line → in tables, in their order."""


def start(
    stack: contextlib.ExitStack,
    chosen: Sequence[str],
    pythons: Mapping[str, Path],
    model: Model,
    folder: Path,
    cores: Sequence[int],
) -> list[Server]:
    """The chosen systems, each asleep, until `stack` ends them."""
    systems: list[Server] = []
    for name, disaggregated in (("pdq", False), ("pdq-1p1d", True)):
        if name in chosen:
            systems.append(Pdq(model, cores, disaggregated=disaggregated))
    if "vllm" in chosen:
        server: ServerProcess = VllmServer("vllm", pythons["vllm"], model, folder, cores)
        systems.append(Peer(SHOWN["vllm"], _asleep(stack, server)))
    if "transformers" in chosen:
        server = _transformers(pythons["transformers"], model, folder)
        systems.append(Transformers(_asleep(stack, server), model))
    if pairs := [name for name in ("vllm-1p1d", "vllm-1p1d-reniced") if name in chosen]:
        pair = stack.enter_context(VllmPair(pythons["vllm"], model, folder, cores))
        systems += [Pair(pair, reniced=name == "vllm-1p1d-reniced") for name in pairs]
    return systems


def _asleep(stack: contextlib.ExitStack, server: ServerProcess) -> ServerProcess:
    stack.callback(server.end)
    wait_healthy([server])
    server.signal(signal.SIGSTOP)
    return server


def _transformers(python: Path, model: Model, folder: Path) -> ServerProcess:
    arguments = [
        "transformers.cli.transformers",
        "serve",
        str(model.folder),
        "--continuous-batching",
        *("--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "sdpa"),
        *("--cb-num-blocks", str(model.pool_tokens // TRANSFORMERS_BLOCK_SIZE)),
        *("--cb-block-size", str(TRANSFORMERS_BLOCK_SIZE), "--cb-max-batch-tokens", "2048"),
    ]
    return ServerProcess("transformers", python, arguments, {"HF_HUB_OFFLINE": "1"}, folder)


def versions(python: Path) -> dict[str, str]:
    """Of what matters among the packages that are installed where `python` is."""
    code = (
        "import importlib.metadata as m, json;"
        "found = {d.metadata['Name']: d.version for d in m.distributions()};"
        "print(json.dumps({n: found[n] for n in ('vllm', 'transformers', 'torch', 'nixl') if n in found}))"
    )
    reply = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(reply.stdout)
    return found
