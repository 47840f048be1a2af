"""One OpenMP for torch and numba: numba's thread pool, bound to the libgomp that torch has loaded.

Numba's wheel asks for the system's `libgomp.so.1.0.0`. Where that is installed (it comes with a
compiler), the process gets a second OpenMP, whose threads fight torch's for the cores; where it is
not, no kernel runs at all. So the name in numba's pool is replaced, in a copy that exists in memory
only, by torch's own library. Where torch brings none, or numba asks for none, nothing is done.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch

POOL = "numba.np.ufunc.omppool"
NEEDED = b"libgomp.so.1.0.0\0"


def bind_to_torch() -> bool:
    """Load numba's pool, before numba does; whether it was bound to torch's library."""
    carried = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    found = importlib.util.find_spec(POOL)
    if len(carried) != 1 or found is None or not found.origin or POOL in sys.modules:
        return False
    original = Path(found.origin).read_bytes()
    library = os.open(carried[0], os.O_RDONLY | os.O_CLOEXEC)
    copy = os.memfd_create("numba-omppool", os.MFD_CLOEXEC)
    try:
        # The loader takes a name with a slash for a path, and a file that is loaded already for
        # what it is: this path leads to the library that torch has loaded.
        name = f"/proc/self/fd/{library}".encode()
        if original.count(NEEDED) != 1 or len(name) >= len(NEEDED):
            return False
        with open(copy, "wb", closefd=False) as file:
            file.write(original.replace(NEEDED, name.ljust(len(NEEDED), b"\0")))
        loader = ExtensionFileLoader(POOL, f"/proc/self/fd/{copy}")
        spec = importlib.util.spec_from_loader(POOL, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.close(library)
        os.close(copy)
    sys.modules[POOL] = module
    sys.modules[POOL.rpartition(".")[0]].omppool = module  # type: ignore[attr-defined]
    return True
