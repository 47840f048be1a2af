"""The seam between a transport and the rest: what is not an error of ours becomes one here.

A transport calls the system and libraries, which raise what they like. Whoever calls a transport does
it through `guarded`, once around each of its calls, and knows `PdqError` alone. So one that fails in a
way that nobody thought of costs its link, and the next transport is tried.
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
    """The result of a transport's `call`; `PdqError`: its own, or `TransportFailed` for anything
    else, with the traceback in the log. In a thread nothing but a transport raises: not even a
    `CancelledError` is a cancel of ours there."""
    try:
        return call(*arguments, **named)
    except PdqError:
        raise
    except BaseException as error:
        what = getattr(call, "__qualname__", type(call).__name__)  # no arguments: proofs are secret
        log.error("transport.failed", transport=transport, call=what, exc_info=error)
        raise TransportFailed(
            f"{transport}: {type(error).__name__}: {error}", param=transport
        ) from error
