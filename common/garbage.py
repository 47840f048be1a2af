"""Pauses by Python's collector of cyclic garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Nothing is collected while libraries are imported, and what is here afterwards stays until the
    process ends: collections would look through all of torch several times, a tenth of a node's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_what_is_here() -> None:
    """All objects that are here now stay until the process ends. To be called at the end of a start: a
    full collection looks at every object it does not know to stay, and what libraries, models and
    tokenizers have made takes it 60 ms in a gateway, 200 ms in a node, in which nobody gets a token."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Nothing is collected meanwhile. For work that makes many objects and little garbage, such as a
    compilation."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
