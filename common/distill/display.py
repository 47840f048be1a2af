"""How far it is: a bar that moves on a terminal, and else a line now and then.

Knows nothing of what is done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_S = 10.0  # a line, where there is no terminal


class Stage:
    """One kind of work, `total` units of it."""

    def __init__(self, console: Console, name: str, total: int, bar: Progress | None) -> None:
        self._console, self._name, self._total, self._bar = console, name, total, bar
        self._task = bar.add_task(name, total=total, about="") if bar is not None else None
        self._began = self._last = time.monotonic()

    def show(self, done: int, about: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, about=about)
            return
        now = time.monotonic()
        if now - self._last >= EVERY_S or done == self._total:
            self._last = now
            seconds = now - self._began
            left = f", {seconds / done * (self._total - done):.0f} s left" if 0 < done < self._total else ""
            about = f"{about}, " if about else ""
            self._console.print(f"{self._name}: {done}/{self._total}, {about}{seconds:.0f} s{left}")


class Display:
    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str = "") -> None:
        self._console.print(line)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        if not self._console.is_terminal:
            yield Stage(self._console, name, total, None)
            return
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[about]}"),
        )
        with Progress(*columns, console=self._console) as bar:
            yield Stage(self._console, name, total, bar)
