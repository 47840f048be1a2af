"""`pdq serve`: one gateway, nodes and Redis on this machine, by one command.

Owns: what it prints, and what is checked before anything starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.text import Text

from common.api_keys import read_keys
from common.commands.settings import Deployment, load_deployment
from common.commands.supervisor import Supervisor
from common.errors import ConfigError, ResourceError
from common.model_files import model_name, resolve_model
from common.model_folder.description import parse_overrides

STYLES = {
    "starting": "yellow",
    "compiling": "yellow",
    "ready": "green",
    "died": "bold red",
    "killed": "bold red",
    "stopping": "yellow",
    "stopped": "dim",
    "shared": "yellow",
    "waiting": "yellow",
}
PROMPT = "Once upon a time there was a king who had a daughter"


def main(argv: Sequence[str]) -> int:
    deployment = load_deployment(argv, os.environ)
    if deployment.gateway.api_key_file:
        read_keys(Path(deployment.gateway.api_key_file).expanduser())
    name = _check_model(deployment)
    _check_port(deployment.gateway.host, deployment.gateway.port)
    out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    width = 12

    compiling = Compiling(out)

    def say(part: str, state: str, about: str) -> None:
        if not compiling.is_news(part, state, about):
            return
        line = Text(f"{part:<{width}} ")
        line.append(f"{state:<9}", STYLES.get(state, ""))
        line.append(f" {about}" if about else "")
        line.rstrip()
        with contextlib.suppress(OSError):  # a terminal that was closed, a pipe nobody reads
            out.print(line)

    def invite(url: str) -> None:
        guarded = deployment.gateway.is_guarded
        with contextlib.suppress(OSError):
            out.print()
            out.print(Text(f"{name} is served at {url} (Ctrl-C stops it). Try:", "bold"))
            out.print(Text(curl_line(url, name, guarded)))
            out.print()

    def show_line(part: str, line: str) -> None:
        with contextlib.suppress(OSError):
            print(f"{part} | {line}", file=sys.stderr, flush=True)

    async def run() -> int:
        try:
            return await Supervisor(deployment, os.environ, say, invite, show_line).run()
        finally:
            compiling.end()

    return asyncio.run(run())


class Compiling:
    """Kernels that are compiled at a first start: on a terminal a line for the first, and below all lines one
    that changes until each part that compiles has said something else."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._status = Status("", console=out)
        self._parts: dict[str, str] = {}
        self._said = False

    def is_news(self, part: str, state: str, about: str) -> bool:
        """Whether a line is to be printed about it."""
        if not self._out.is_terminal:
            return True
        if state != "compiling":
            if self._parts.pop(part, None) is not None and not self._parts:
                self.end()
            return True
        said, self._said = self._said, True
        self._parts[part] = about
        with contextlib.suppress(OSError):  # the terminal was closed
            self._status.update(Text("; ".join(f"{part}: {about}" for part, about in self._parts.items())))
            self._status.start()
        return not said

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._status.stop()


def curl_line(url: str, model: str, guarded: bool) -> str:
    """A command to paste into a shell. A key is named, never shown."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 64, "temperature": 0.6}
    parts = ["curl", f"{url}/v1/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*parts, "-d", json.dumps(body, ensure_ascii=False)])
    return line + (' -H "Authorization: Bearer $PDQ_API_KEY"' if guarded else "")


def _check_model(deployment: Deployment) -> str:
    """The name clients use. From here on gateway and nodes find the model in its place: it is
    downloaded once, not by each of them."""
    engine = deployment.node.engine
    folder = resolve_model(
        engine.model,
        engine.revision,
        weights=engine.load_format == "auto",
        overrides=parse_overrides(engine.hf_overrides),
    )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no model: config.json is missing", param="model")
    return engine.served_model_name or model_name(engine.model, folder)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} of {host} is taken; --port names another", param="port"
            ) from error
        raise ResourceError(f"cannot listen on {host}:{port}: {error}", param="port") from error
