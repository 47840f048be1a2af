"""Ctrl-C: the first one in training ends it early, any other one ends everything."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    def __init__(self) -> None:
        self._can_end_early = False
        self.is_wanted = False

    def take_signals(self) -> None:
        signal.signal(signal.SIGINT, lambda *_: self.ask())
        signal.signal(signal.SIGTERM, lambda *_: self.interrupt())

    @contextlib.contextmanager
    def ends_early(self) -> Iterator[None]:
        """What runs in it looks at `is_wanted` now and then."""
        self._can_end_early = True
        try:
            yield
        finally:
            self._can_end_early = False

    def ask(self) -> None:
        if not self._can_end_early or self.is_wanted:
            self.interrupt()
        self.is_wanted = True

    def interrupt(self) -> None:
        raise KeyboardInterrupt
