"""Descriptors that this process may open: the soft limit goes up to the hard one at start.

Owns: the only use of RLIMIT_NOFILE. Does not know what the descriptors are for.
"""

from __future__ import annotations

import contextlib
import resource

from common.errors import ResourceError
from common.logs import get_logger

ENOUGH = 2**20  # a soft limit beyond it buys nothing

log = get_logger("descriptors")


def raise_limit() -> int:
    """The descriptors this process may have open, after asking for as many as it may get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return ENOUGH if soft == resource.RLIM_INFINITY else soft


def require(count: int, what: str) -> int:
    """The limit, raised as far as it goes; `ResourceError` if that is less than `count`."""
    limit = raise_limit()
    if limit < count:
        raise ResourceError(
            f"{limit} open files are allowed (ulimit -n), {what} needs at least {count}", param="ulimit"
        )
    return limit


def room_for(wanted: int, reserve: int, least: int, what: str) -> int:
    """How many of `wanted` descriptors fit beside `reserve` others: all, or fewer with a warning.

    Raises `ResourceError` when fewer than `least` (or than `wanted`, if that is less) fit.
    """
    limit = require(reserve + min(least, wanted), what)
    room = min(wanted, limit - reserve)
    if room < wanted:
        log.warning("descriptors.few", limit=limit, wanted=wanted + reserve, what=what, used=room)
    return room
