"""Every transport, with an error at every call of its own code while it opens: nothing is left.

A trace function raises at the n-th call of a function of kv_transfer in the thread that opens, for
every n that there is. What the transport had by then, it has to give back by itself: nobody else has
heard of it yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from common.errors import PdqError
from kv_transfer.ports import Piece
from tests.integration.test_transports import (
    CUDA,
    KEY,
    NCCL,
    NIXL,
    ON_DEVICE,
    End,
    _nothing_is_left,  # noqa: F401  (autouse: descriptors, threads, fake devices)
    both_ends,
    wait_until,
)
from tests.support.holdings import holdings

ERRORS = itertools.cycle([OSError, RuntimeError, MemoryError, KeyError, asyncio.CancelledError])


@contextlib.contextmanager
def raising_at(number: int, error: type[BaseException]) -> Iterator[list[str]]:
    """Raise at the `number`-th call of a function of kv_transfer in this thread, counted from 1; the
    functions that were called until then."""
    called: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "/kv_transfer/" in frame.f_code.co_filename and event == "call":
            called.append(frame.f_code.co_qualname)
            if len(called) == number:
                sys.settrace(before)
                raise error("foreign")
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield called
    finally:
        sys.settrace(before)


def at_every_call(open_: Callable[[], object]) -> Iterator[str]:
    """Have `open_` fail at one call after the other, until it opens; where it failed."""
    for number in itertools.count(1):
        error = next(ERRORS)
        with raising_at(number, error) as called:
            try:
                open_()
            except (error, PdqError):
                pass
            else:
                assert len(called) < number, f"{called[-1]} has raised, and nobody minded"
                return
        yield called[-1]


def held() -> Counter[str]:
    gc.collect()  # a pool's mapping ends with the last tensor over it
    fakes = {"of the device": CUDA.left, "communicators": NCCL.left}
    return holdings(os.getpid()).descriptors + Counter(fakes)


@contextlib.contextmanager
def used_before(transport: str) -> Iterator[tuple[End, list[Piece], Callable[[str], None]]]:
    """Both ends, which have copied already: what is made once is there. What pieces to copy, and the
    look at what is held beside that while no link is open."""
    with both_ends(transport) as end:
        for block in range(3):
            end.fill(block)
        end.leases.add(KEY, list(range(3)))
        pieces = [end.piece(block, block, index=block) for block in range(3)]
        end.reader().pull(pieces)
        end.readers.pop().close()
        end.source.close_link("link")
        before = held()

        def look(where: str) -> None:
            end.source.close_link("link")
            wait_until(lambda: held() <= before, f"nothing is left; it failed in {where}")
            assert not end.leases.count()["touched"], f"it failed in {where}"

        yield end, pieces, look


@pytest.mark.parametrize("transport", ["shm", "shm+folder", "tcp", "tcp+curve", NIXL, *ON_DEVICE, "shm:3"])
def test_a_link_that_fails_anywhere_while_it_opens_leaves_nothing(transport: str) -> None:
    """At the source, whose link is closed, or at the reader, which nobody has; one stands for all that
    convert, which is the same over any."""
    with used_before(transport) as (end, pieces, look):
        for where in at_every_call(end.reader):
            look(where)
        end.readers[-1].pull(pieces)
        assert all(end.same(block, block) for block in range(3))


@pytest.mark.parametrize("transport", ["shm", "tcp", "tcp+curve", "tcp+staged", "cuda_ipc", "nccl", "shm:3"])
def test_a_pull_that_fails_anywhere_leaves_nothing_once_its_link_is_closed(transport: str) -> None:
    with used_before(transport) as (end, pieces, look):
        end.reader()
        for where in at_every_call(lambda: end.readers[-1].pull(pieces)):
            end.readers.pop().close()
            look(where)
            end.reader()
        assert all(end.same(block, block) for block in range(3))
