"""A `pdq serve` as a person starts it: its own process, its output line by line, and what it leaves.

Its temporary files and its note go to folders of the test's, so that leftovers are seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.redis import HANGS_S

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 120.0  # without any line
END_LIMIT_S = 90.0  # a drain takes up to 30


class ServeProcess:
    """Use `serving`. `lines` are those of stdout, `errors` those of stderr."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        command: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.variables = dict(variables or {})
        self.temporary, self.notes = folder / "tmp", folder / "run"
        for place in (self.temporary, self.notes):
            place.mkdir()
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.children: dict[int, psutil.Process] = {}
        self.ports: set[int] = set()
        self._heard = threading.Condition()
        self.process = subprocess.Popen(
            command or [sys.executable, "-W", "error", "-m", "common.cli", "serve", *flags],
            cwd=ROOT,
            env=self.environment() | self.variables,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        streams = ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        self._readers = [
            threading.Thread(target=self._read, args=stream_and_lines, daemon=True)
            for stream_and_lines in streams
        ]
        for reader in self._readers:
            reader.start()

    def environment(self) -> dict[str, str]:
        own = {"TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": str(self.notes)}
        clean = {name: v for name, v in os.environ.items() if not name.startswith("PDQ_")}
        return {**clean, **own, "COLUMNS": "80"}

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._heard:
                    lines.append(line.rstrip("\n"))
                    self._heard.notify_all()

    def line(self, pattern: str, count: int = 1, limit_s: float = START_LIMIT_S) -> re.Match[str]:
        """The `count`th line of stdout that matches, once it is there: `limit_s` after any other at most."""

        def found() -> list[re.Match[str]]:
            return [match for line in self.lines if (match := re.search(pattern, line))]

        with self._heard:
            heard = True
            while heard and len(found()) < count and self.process.poll() is None:
                heard = self._heard.wait(limit_s)
            matches = found()
        assert heard or matches, f"no line {pattern!r}, nor any other for {limit_s} s: {self.output}"
        assert len(matches) >= count, f"it ended: {self.output}"
        return matches[count - 1]

    @property
    def output(self) -> str:
        return "\n".join([*self.lines, *self.errors])

    def url(self) -> str:
        """Where it serves, once it does. What runs then is remembered, for `assert_nothing_left`."""
        url = self.line(r"is served at (http://\S+)")[1]
        self.look()
        return url

    def look(self) -> None:
        """Remember the processes there are and what they listen on."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.children[child.pid] = child
                self.ports |= {
                    connection.laddr.port
                    for connection in child.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                }

    def pid_of(self, part: str) -> int:
        """Of the latest life of a part."""
        return int([m for line in self.lines if (m := re.search(rf"^{part} .* pid (\d+)", line))][-1][1])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, limit_s: float = END_LIMIT_S) -> int:
        """Its exit code, once it has ended and all it wrote is read."""
        code = self.process.wait(limit_s)
        for reader in self._readers:
            reader.join(limit_s)
            assert not reader.is_alive(), "somebody still holds its output: a process is left"
        return code

    def assert_nothing_left(self) -> None:
        """No process, no listening socket, no file."""
        _, alive = psutil.wait_procs(list(self.children.values()), timeout=5)
        assert not alive, f"left running: {[child.cmdline() for child in alive]}"
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still answers"
        left = [path for place in (self.temporary, self.notes) for path in place.rglob("*")]
        assert not [path for path in left if path != self.notes / "pdq"], left

    def pdq(self, *arguments: str) -> str:
        """Output of another command of the same user."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "common.cli", *arguments],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout

    def pdq_json(self, *arguments: str) -> Any:
        return json.loads(self.pdq(*arguments, "--json"))


@contextlib.contextmanager
def serving(
    folder: Path, *flags: str, command: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[ServeProcess]:
    """A started one, by `command` where that is given, with these variables more; whatever happens,
    it is ended, by Ctrl-C if it can be."""
    serve = ServeProcess(folder, *flags, command=command, variables=variables)
    try:
        yield serve
    finally:
        if serve.process.poll() is None:
            serve.look()
            serve.signal(signal.SIGINT)
        try:
            serve.end()
        except subprocess.TimeoutExpired:
            serve.process.kill()
            serve.end()
            raise


def wait_until(condition: Any, what: str, limit_s: float = HANGS_S) -> None:
    """Return as soon as `condition()` holds; fail with `what` if it does not come about."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
