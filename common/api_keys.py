"""API keys as an operator writes them down: what one looks like, and the file that holds several.

A key travels in a header, in a list with commas, and alone in a line of a file: it is printable ASCII
without spaces or commas. No error shows a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from common.errors import ConfigError
from common.secret_files import read_secret


def check_keys(keys: Iterable[str], source: str) -> None:
    """`ConfigError`, which counts keys from 1, if one of them could not be shown by a client."""
    for number, key in enumerate(keys, 1):
        if not key or any(not "!" <= character <= "~" or character == "," for character in key):
            raise ConfigError(
                f"key {number} of {source} must be printable ASCII without spaces or commas", param="api_keys"
            )


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, at least one: one a line, where # begins a comment."""
    lines = read_secret(path, "the file of API keys").removeprefix("\ufeff").splitlines()
    keys = []
    for number, line in enumerate(lines, 1):
        key, *rest = line.split(maxsplit=1) or [""]
        if not key or key.startswith("#"):
            continue
        if rest and not rest[0].startswith("#"):
            raise ConfigError(
                f"line {number} of {path} holds more than a key: write one a line", param=str(path)
            )
        check_keys((key,), f"line {number} of {path}")
        keys.append(key)
    if not keys:
        raise ConfigError(f"{path} holds no API key", param=str(path))
    return tuple(keys)
