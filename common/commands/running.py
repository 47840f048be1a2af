"""The note that a running `pdq serve` leaves for the other commands of the same user.

Owns: one file per `pdq serve`, `serve-PID.json` in `$XDG_RUNTIME_DIR/pdq` or else `~/.cache/pdq`
(`$XDG_CACHE_HOME/pdq`), readable by its user only, because the address of Redis may hold a
password. It is removed at the end; one whose process is gone (kill -9) is removed by whoever
finds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from common.errors import ConfigError, ResourceError
from common.settings.config import RedisSettings

PATTERN = "serve-*.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A `pdq serve` that runs. `started` is its process' start on the system's clock, in seconds;
    with the pid it names the process for good."""

    pid: int
    started: float
    url: str
    redis_url: str
    redis_prefix: str


def folder(environ: Mapping[str, str]) -> Path:
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "pdq")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home(), ".cache")
    return Path(cache, "pdq")


@contextlib.contextmanager
def announced(url: str, redis: RedisSettings, environ: Mapping[str, str]) -> Iterator[Path]:
    """While the context lasts, `find` finds this process."""
    note = Running(os.getpid(), psutil.Process().create_time(), url, redis.url, redis.prefix)
    place = folder(environ)
    path = place / f"serve-{note.pid}.json"
    unfinished = path.with_suffix(".part")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps(dataclasses.asdict(note)), encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path}: {error}", param=str(path)) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def find(environ: Mapping[str, str]) -> Running | None:
    """The `pdq serve` of this user that was started last, if one runs."""
    found = [note for path in folder(environ).glob(PATTERN) if (note := _read(path)) is not None]
    return max(found, key=lambda note: note.started, default=None)


def redis_of(settings: RedisSettings, environ: Mapping[str, str]) -> RedisSettings:
    """Where Redis is: as set, or that of the running `pdq serve`; `ConfigError` if neither."""
    if settings.url:
        return settings
    note = find(environ)
    if note is None:
        raise ConfigError(
            "no `pdq serve` of this user is running; name a Redis with --redis-url or PDQ_REDIS_URL"
        )
    return dataclasses.replace(settings, url=note.redis_url, prefix=note.redis_prefix)


def _read(path: Path) -> Running | None:
    """The note, unless its process is gone: then it is removed."""
    try:
        note = Running(**json.loads(path.read_text(encoding="utf-8")))
        if psutil.Process(note.pid).create_time() == note.started:
            return note
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        pass
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return None
