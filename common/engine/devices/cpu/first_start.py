"""At a first start another core compiles the sampler's kernels, which no model changes, beside the model's.

Owns that process. Whoever samples before it has ended waits for the kernel, as processes do for each other
(kernel_cache.py); where it fails, kernels are compiled when they are needed.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading

import numpy as np
import torch

from common.child_process import die_with_parent
from common.engine.devices.cpu import kernel_cache, sampling
from common.engine.sampling.records import SampleRows
from common.engine.sampling.slots import SlotTable
from common.logs import configure, get_logger

log = get_logger("kernels")


@functools.cache
def compile_sampler_beside() -> None:
    """Begin, where they are not in the cache; returns at once. A process begins it once, though a draft model
    has a backend of its own."""
    if kernel_cache.is_new(sampling.sample_rows):
        follow = die_with_parent(os.getpid())

        def run() -> None:
            follow()
            # The engine's own cores have the model's kernels to compile.
            os.sched_setaffinity(0, range(os.cpu_count() or 1))

        try:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                preexec_fn=run,
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("kernels.compiled_later", error=error)
        else:
            threading.Thread(target=process.wait, name="first-start", daemon=True).start()


def compile_sampler() -> None:
    """All kernels of the sampler, by computing nothing."""
    none = np.zeros(0, np.int64)
    sampler = sampling.NumbaSampling(1)
    sampler.sample(torch.zeros(0, 1), SampleRows(none, none), SlotTable(1, 1))
    sampler.logprobs(torch.zeros(0, 1), none, none)
    sampler.open_counts(none, none)


if __name__ == "__main__":
    configure("kernels", "warning")
    compile_sampler()
