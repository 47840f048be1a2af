"""The folder in which a process keeps what it can make again: compiled kernels, measurements.

Owns where it is. What lies there is trusted by nobody, and needed by nobody.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path | None:
    """Made, writable, and of this user alone; None where there is no such folder."""
    for parent in ("~/.cache/pdq", f"{tempfile.gettempdir()}/pdq-{os.getuid()}"):
        try:
            folder = Path(parent).expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = folder.stat().st_uid
        except (OSError, RuntimeError):  # the latter where the user has no home at all
            continue
        if os.access(folder, os.W_OK) and owner == os.getuid():
            return folder
    return None
