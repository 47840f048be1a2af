"""One child process of `pdq serve`: started on its cores, listened to, and never left behind.

Owns: the process, what it wrote last, and its end. Knows nothing of what it does. It dies with us,
even by kill -9, and a Ctrl-C in the terminal reaches us only. It stays in our session: see
`common/processor_share.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from common.child_process import die_with_parent

KEPT_LINES = 200
LONGEST_LINE = 2**16


class Child:
    """A started process. What it writes to stderr is kept until `show` says where it goes, but for the lines
    that `takes` takes."""

    def __init__(self, process: asyncio.subprocess.Process, takes: Callable[[str], bool]) -> None:
        self._process = process
        self._takes = takes
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._show: Callable[[str], None] | None = None
        self._reading = asyncio.create_task(self._read())
        self.ended = asyncio.create_task(self._end())

    @classmethod
    async def start(
        cls,
        module: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cores: Sequence[int],
        niceness: int = 0,
        takes: Callable[[str], bool] = lambda line: False,
    ) -> Child:
        """`python -m module argv…`, with our stderr as its stdout; `niceness` is added to ours."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=dict(environment),
            limit=LONGEST_LINE,
            process_group=0,
            preexec_fn=_before_exec(os.getpid(), cores, niceness),
        )
        return cls(process, takes)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def last_words(self) -> str:
        """Its last line, or ""."""
        return next((line for line in reversed(self._lines) if line.strip()), "")

    def show(self, show: Callable[[str], None]) -> None:
        """Give what was kept, and from now on every line, to `show`."""
        self._show = show
        for line in self._lines:
            show(line)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _end(self) -> int:
        """Its exit code (negative: the signal that killed it), once its last words are read."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open: that must not keep us.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reading, 1.0)
        return code

    async def _read(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while True:
            try:
                data = await stream.readline()
            except ValueError:  # longer than LONGEST_LINE; what was read of it is gone
                continue
            if not data:
                return
            line = data.decode("utf-8", "replace").rstrip()
            if self._takes(line):
                continue
            self._lines.append(line)
            if self._show is not None:
                self._show(line)


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _before_exec(parent: int, cores: Sequence[int], niceness: int) -> Callable[[], None]:
    """What the child does between fork and exec: see `die_with_parent`."""
    follow, bound = die_with_parent(parent), tuple(cores)

    def run() -> None:
        follow()
        os.sched_setaffinity(0, bound)
        os.nice(niceness)

    return run
