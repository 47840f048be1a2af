"""Files that hold a secret: nobody but their user may be able to read them.

Owns: the rule, which is ssh's. A file of ours that others may read or write is refused, because its
secret is none any more; one of another user's, such as a secret that a container has mounted, is
that user's business. The rule is held against the open file, so that nothing can come between.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from common.errors import ConfigError

LARGEST = 2**16


def read_secret(path: Path, what: str) -> str:
    """The file's text; `ConfigError`, which calls it `what`, if it cannot be read or is not private."""
    try:
        with path.open("rb") as file:
            require_private(file.fileno(), path, what)
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"{what} {path} is larger than {LARGEST} bytes", param=str(path))
        return content.decode("utf-8")
    except UnicodeDecodeError as error:  # whose text would show what stands there
        raise ConfigError(f"{what} {path} is not UTF-8", param=str(path)) from error
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}", param=str(path)) from error


def require_private(descriptor: int, path: Path, what: str) -> None:
    """`ConfigError` if the open file is ours and others may read or write it."""
    status = os.fstat(descriptor)
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{what} {path} can be read or written by others: chmod 600 {path}", param=str(path)
        )


def require_own_folder(path: Path, what: str) -> None:
    """`ConfigError` unless the folder is ours and nobody else can change what lies in it."""
    status = path.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ConfigError(
            f"{what} is not kept in {path}, which others can write to: chmod 700 {path}", param=str(path)
        )


def write_secret(path: Path, text: str, *, replace: bool = True) -> None:
    """Make the file, readable by its user only, whole or not at all. Without `replace`, one that is
    there already stays. `OSError` where it cannot be made."""
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        if replace:
            unfinished.rename(path)
        else:
            with suppress(FileExistsError):
                os.link(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
