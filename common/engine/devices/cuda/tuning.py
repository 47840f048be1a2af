"""Which of several launches is the fastest on this card: measured once, then read from a file.

Owns the file. What it names are launches that a process has anyway, and that are proven before they are
used, so that nothing in it can change a bit: one that is damaged, whoever wrote it, costs a measurement, and
one that cannot be written is not. Processes do not wait for each other: each has a GPU of its own to measure
on, and the last to write wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from common.cache_folder import cache_folder
from common.engine.devices.cuda.kernels import products
from common.engine.devices.cuda.settling import Way
from common.engine.devices.cuda.timing import EventTimer, Timer
from common.logs import get_logger

log = get_logger("products")

_LARGEST_FILE = 1 << 20  # bytes


class Tuning:
    """The fastest of ways, by a key that names what they compute. `file` is None where nothing is kept."""

    @classmethod
    def of_card(cls, card: str, device: torch.device) -> Tuning:
        """By events on the device, kept for all cards that are called so."""
        digest = hashlib.blake2b(f"{card} {triton.__version__} {torch.__version__}".encode(), digest_size=8)
        digest.update(Path(products.__file__).read_bytes())
        folder = cache_folder()
        file = None if folder is None else folder / f"gpu-launches-{digest.hexdigest()}.json"
        return cls(EventTimer(device), file)

    def __init__(self, timer: Timer, file: Path | None) -> None:
        self._timer, self._file = timer, file
        self._fastest = {} if file is None else _read(file)
        self._is_new = False

    def ranked(self, key: str, ways: Sequence[Way], call: Callable[[Way], None]) -> Sequence[Way]:
        """`ways`, the fastest first and the others as they come. `call` launches one."""
        if len(ways) < 2:
            return ways
        names = [way.name for way in ways]
        fastest = self._fastest.get(key)
        if fastest not in names:
            seconds = [self._seconds(way, call) for way in ways]
            fastest = self._fastest[key] = names[seconds.index(min(seconds))]
            self._is_new = True
            log.info("products.tuned", key=key, way=fastest, microseconds=_shown(names, seconds))
        return sorted(ways, key=lambda way: way.name != fastest)

    def _seconds(self, way: Way, call: Callable[[Way], None]) -> float:
        try:
            return self._timer(lambda: call(way))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler or a launch; whoever proves the way will say so again
            log.warning("products.not_timed", way=way.name, error=error)
            return math.inf

    def save(self) -> None:
        """What was measured, beside what other processes have written meanwhile."""
        if self._file is None or not self._is_new:
            return
        content = json.dumps(_read(self._file) | self._fastest, sort_keys=True)
        new = self._file.with_name(f"{self._file.name}.{secrets.token_hex(4)}")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_text(f"{_digest(content)}\n{content}")
            os.replace(new, self._file)
        except OSError as error:
            log.warning("products.not_kept", file=self._file, error=error)
            with contextlib.suppress(OSError):
                new.unlink()
        self._is_new = False


def _read(file: Path) -> dict[str, str]:
    """What the file holds; nothing where it is absent or not as it was written."""
    try:
        with file.open("rb") as opened:
            digest, _, content = opened.read(_LARGEST_FILE).decode().partition("\n")
        found: Any = json.loads(content) if digest == _digest(content) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("products.tuning_unreadable", file=file, error=error)
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        log.warning("products.tuning_unreadable", file=file, error="damaged")
        return {}
    return found


def _digest(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _shown(names: Sequence[str], seconds: Sequence[float]) -> dict[str, float]:
    return {name: round(value * 1e6, 1) for name, value in zip(names, seconds, strict=True)}
