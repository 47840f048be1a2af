"""A whole system for a benchmark: `pdq serve`, up and ready, and ended after."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

import psutil

START_LIMIT_S = 300.0


@contextlib.contextmanager
def served(
    port: int, flags: Sequence[str], nodes: Sequence[str] = ("--unified", "1")
) -> Iterator[psutil.Process]:
    """The process of `pdq serve` with these `nodes`; its gateway is at `port` of loopback."""
    command = [sys.executable, "-m", "common.cli", "serve", *nodes, "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("pdq serve did not come up")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
