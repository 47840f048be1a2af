"""The seam between a transport and the rest: foreign errors become ours here.

A transport calls the system and libraries, which may raise anything. Every call of a transport goes
through `guarded`, so that callers know `PdqError` alone. A transport that fails in an unforeseen way
costs its link, and the next transport is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from common.errors import PdqError, TransportFailed
from common.logs import get_logger

log = get_logger("kv")

P = ParamSpec("P")
T = TypeVar("T")


def guarded(transport: str, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Return the result of a transport's `call`. Its `PdqError`s pass; anything else becomes
    `TransportFailed`, with the traceback in the log. Even a `CancelledError` is the transport's: it
    runs in a thread, where we cancel nothing."""
    try:
        return call(*arguments, **named)
    except PdqError:
        raise
    except BaseException as error:
        what = getattr(call, "__qualname__", type(call).__name__)  # no arguments: proofs are secret
        log.error("transport.failed", transport=transport, call=what, exc_info=error)
        raise TransportFailed(f"{transport}: {type(error).__name__}: {error}", param=transport) from error
