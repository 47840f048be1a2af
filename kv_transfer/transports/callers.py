"""Those who have connected to a source and not yet shown that they belong to a link.

A caller that says nothing costs a descriptor, so there is a bound: beyond it the oldest is closed.
"""

from __future__ import annotations

import collections
import selectors
import socket
import time

from kv_transfer.transports.wires import LOOK_S


class Callers:
    """All methods belong to the thread that waits at `selector`."""

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector, most: int) -> None:
        """`listener` does not block. It and each caller are registered for reading."""
        self._listener, self._selector, self._most = listener, selector, most
        self._silent: collections.deque[socket.socket] = collections.deque()
        selector.register(listener, selectors.EVENT_READ)

    def heard(self, ready: object) -> socket.socket | None:
        """Handle what the selector found ready. Returns a caller that has sent something, or is gone."""
        if ready is self._listener:
            self._accept()
        elif ready in self._silent:
            assert isinstance(ready, socket.socket)
            return ready
        return None

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left: the caller goes on waiting, and the listener calls
            time.sleep(LOOK_S)
            return
        caller.setblocking(False)
        self._silent.append(caller)
        self._selector.register(caller, selectors.EVENT_READ)
        if len(self._silent) > self._most:
            self.hang_up(self._silent[0])

    def take(self, caller: socket.socket) -> None:
        """Let a caller stay connected, no longer as one of these. It stays registered."""
        self._silent.remove(caller)

    def let_go(self, caller: socket.socket) -> None:
        """Leave a caller to somebody else, connected; the selector hears of it no more."""
        self._selector.unregister(caller)
        self._silent.remove(caller)

    def hang_up(self, caller: socket.socket) -> None:
        self.let_go(caller)
        caller.close()

    def close(self) -> None:
        """Hang up on all of them, and listen no more. May be called twice."""
        for caller in list(self._silent):
            self.hang_up(caller)
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            self._listener.close()
