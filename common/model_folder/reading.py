"""Reading the small files of a model's folder: whole, bounded, and with errors that name the file.

Owns: how much is read, what counts as text and as JSON, and the types of single fields. A folder
is given by an operator but written by strangers: a file may be huge, a pipe, a link, or no JSON.
Knows no particular field.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, UnsupportedModel

MAX_JSON_BYTES = 2**24  # the largest config known is 200 kB
MAX_TEXT_BYTES = 2**22
MAX_TOKENIZER_BYTES = 2**29  # of a large multilingual vocabulary: 35 MB

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; raises `CheckpointError`. A pipe or a device that is named
    like a file is neither waited for nor read for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        what = "is a link to a file that is missing" if path.is_symlink() else "is missing"
        raise _error(path, what) from error
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _error(path, "is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file; raises `CheckpointError`, also for more than `limit` bytes."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise _error(path, f"has {size} bytes, {limit} are read at most")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The content as UTF-8; a byte order mark in front is left out."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error(path, f"is not UTF-8: byte {error.start} is wrong") from error


def read_object(path: Path, *, required: bool = False, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no such file and none is required.

    A key that stands twice is an error: which of its values holds depends on the reader. So is half
    of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    if not required and not os.path.lexists(path):
        return {}
    return parse_object(path, read_text(path, limit))


def parse_object(path: Path, text: str) -> dict[str, Any]:
    """As `read_object`, of what stands in `path`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _error(path, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _error(path, "does not hold a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r:.100} stands twice in one object")
    return value


def _error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", param=str(path))


def wrong(file: str, field: str, wanted: str, value: Any) -> UnsupportedModel:
    """The error for a field whose value cannot be used."""
    return UnsupportedModel(f"{file}: {field} must be {wanted}, not {value!r:.100}", param=field)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(source: Mapping[str, Any], field: str, file: str, least: int = 1) -> int | None:
    """An integer of at least `least`, None where it is null or absent."""
    value = source.get(field)
    if value is None:
        return None
    if not is_int(value) or not least <= value < 2**31:
        raise wrong(file, field, f"an integer of at least {least}", value)
    return int(value)


def number(source: Mapping[str, Any], field: str, file: str, name: str = "") -> float | None:
    """A finite number, None where it is null or absent; `name` is what an error calls the field."""
    value = source.get(field)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            if math.isfinite(found := float(value)):
                return found
    raise wrong(file, name or field, "a finite number", value)


def section(source: Mapping[str, Any], field: str, file: str) -> dict[str, Any]:
    """An object inside, empty where it is null or absent."""
    value = source.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(file, field, "an object", value)
    return value
