"""A server of another engine, in an environment of its own: started, asleep, awake, ended.

Owns its processes. While another system is measured all of them are stopped (SIGSTOP) and take no CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from common.child_process import die_with_parent

START_LIMIT_S, STOP_LIMIT_S = 240.0, 8.0
LOG_LINES = 20  # shown of a server that did not come up


class ServerProcess:
    """The server and all that it starts, by `python -m …` of that environment; it ends with us."""

    def __init__(
        self, name: str, python: Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{name}.log"
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = f"{python.parent}:{os.environ.get('PATH', '')}"
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(python), "-m", *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=folder,
                env=inherited | {"PATH": path} | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=die_with_parent(os.getpid()),
            )

    def family(self) -> list[psutil.Process]:
        """The server and all that it started, and they started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def signal(self, number: signal.Signals) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        family = self.family()
        self._process.terminate()
        _, left = psutil.wait_procs(family, STOP_LIMIT_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def healthy(self, deadline: float) -> bool:
        """Whether it answers by now; `SystemExit` with the end of its log if it never will."""
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            return True
        if self._process.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise SystemExit(f"{self.name} did not come up:\n{last}")
        return False


def wait_healthy(servers: Sequence[ServerProcess]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    for server in servers:
        while not server.healthy(deadline):
            time.sleep(0.5)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
