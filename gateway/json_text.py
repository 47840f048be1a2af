"""JSON put together from parts that are JSON already, so that no answer is written in one long go.

Owns: how values are written in answers, and lists that grow piece by piece as text. An answer of
many megabytes costs the event loop a copy at its end, not the encoding of every value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def with_members(small: Mapping[str, object], members: Mapping[str, bytes]) -> bytes:
    """The object `small` with further members whose values are JSON."""
    parts = [dumps(small)[1:-1]] if small else []
    parts += [dumps(name) + b":" + value for name, value in members.items()]
    return b"{" + b",".join(parts) + b"}"


def joined(first: bytes, second: bytes) -> bytes:
    """Two JSON strings as one."""
    return first[:-1] + second[1:] if first else second


class JSONList:
    """A list, as text from the start."""

    def __init__(self) -> None:
        self._text = bytearray(b"[")

    def extend(self, values: Iterable[object]) -> None:
        data = dumps(list(values))[1:-1]
        if data:
            if len(self._text) > 1:
                self._text += b","
            self._text += data

    @property
    def text(self) -> bytes:
        return bytes(self._text) + b"]"
