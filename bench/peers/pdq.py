"""One prefill and one decode node of ours behind a gateway, as a measured system.

The nodes are real ones that also write down when chunks end and blocks are copied
(`bench/node_clock.py`), on the same clock as the client.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.peers.system import SERVED_NAME, Completion, Copies, Model, completion_body, token_times
from common.commands.bench.client import Client
from tests.support.deployment import Deployment

BLOCK_SIZE = 16


class _Nodes(Deployment):
    """As `pdq serve` starts them, with our flags."""

    def __init__(self, model: Model, folder: Path, transport: str, cores: Sequence[int]) -> None:
        super().__init__(
            model.folder, prefill=1, decode=1, gateway_flags=("--served-model-name", SERVED_NAME)
        )
        self._num_blocks = model.pool_tokens // BLOCK_SIZE
        self._transport = transport
        self._cores = dict(zip(self.roles, cores, strict=True))
        self.clocks = {name: folder / f"{transport}-{name}.jsonl" for name in self.roles}

    def start_node(self, name: str, role: str) -> None:
        self.start(
            name,
            "bench.node_clock",
            "--role",
            role,
            "--name",
            name,
            "--model",
            str(self.model),
            "--served-model-name",
            SERVED_NAME,
            "--dtype",
            "bfloat16",
            "--load-format",
            "dummy",
            "--threads",
            "1",
            "--cores",
            str(self._cores[name]),
            "--block-size",
            str(BLOCK_SIZE),
            "--num-kv-blocks",
            str(self._num_blocks),
            "--transports",
            self._transport,
            str(self.clocks[name]),
        )


class Pdq:
    """Implements `System`. Ended, not paused, between two measurements: nodes that a pause makes
    late would take each other for dead."""

    def __init__(self, model: Model, folder: Path, transport: str, cores: Sequence[int]) -> None:
        self.name = f"pdq, {transport}"
        self._model = model
        self._make = functools.partial(_Nodes, model, folder, transport, cores)
        self._nodes: _Nodes | None = None
        self._client: Client | None = None
        self.prompt_tokens = 0
        self._read_to: dict[Path, int] = {}  # characters of each clock's file

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        nodes = self._nodes = self._make()
        self.prompt_tokens = 0
        with nodes:
            for path in nodes.clocks.values():
                self._read_to[path] = len(path.read_text())  # what an earlier life wrote
            self._client = Client(nodes.url, "", 120.0)
            yield

    def processes(self) -> list[psutil.Process]:
        assert self._nodes is not None
        pids = [self._nodes.redis.pid, *(p.pid for p in self._nodes.processes.values())]
        return [psutil.Process(pid) for pid in pids]

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        assert self._client is not None
        request = self._client.encode(completion_body(prompt, max_tokens, stream=True))
        exchange = await self._client.exchange(request)
        self.prompt_tokens += len(prompt)
        times = token_times(exchange, max_tokens)
        return Completion(exchange.sent_at, times[0], times, times[1:])

    async def copies(self, prompt_len: int) -> Copies:
        notes = self._new_notes()
        adopted = [n for n in notes if n["what"] == "adopted"]
        computed = [n["at"] for n in notes if n["what"] == "chunk" and n["end"] == prompt_len]
        pulls = [n for n in notes if n["what"] == "pull"]
        blocks = sum(n["pieces"] for n in pulls)
        if len(adopted) != 1 or len(computed) != 1 or blocks != -(-prompt_len // BLOCK_SIZE):
            raise RuntimeError(f"{len(adopted)} handoffs, {len(computed)} prompts, {blocks} blocks copied")
        return Copies(
            seconds=sum(n["at"] - n["begin"] for n in pulls),
            unhidden_s=sum(max(0.0, n["at"] - max(n["begin"], computed[0])) for n in pulls),
            num_bytes=prompt_len * self._model.kv_bytes_per_token,
        )

    def _new_notes(self) -> list[dict[str, Any]]:
        assert self._nodes is not None
        lines = []
        for path in self._nodes.clocks.values():
            text = path.read_text()
            lines += text[self._read_to[path] :].splitlines()
            self._read_to[path] = len(text)
        return [json.loads(line) for line in lines]
