"""The CPU's kernels, compiled once for all processes of a run.

On a machine that has none it takes most of a minute of a processor; whatever starts meanwhile, each
node of each system too, would compile them for itself.
"""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path


@functools.cache
def compile_kernels() -> None:
    """Until the cache has what an engine begins with, in both types of numbers. One process compiles,
    the others wait for it."""
    from common.engine.devices.cpu import numba_runtime  # and with it torch, which many tests can do without
    from common.model_files import SHIPPED_MODEL
    from tests.support.engines import poisoned_engine

    if not (kept := numba_runtime.numba.config.CACHE_DIR):
        return
    folder = os.open(Path(kept).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for dtype in ("float32", "bfloat16"):
            poisoned_engine(dtype=dtype).warm_up()
        poisoned_engine(model=str(SHIPPED_MODEL), dtype="bfloat16").warm_up()  # what `pdq serve` serves
    finally:
        os.close(folder)
