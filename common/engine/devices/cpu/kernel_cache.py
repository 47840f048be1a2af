"""Compiled kernels on disk: numba's files, but none of them is trusted, and none is needed.

Owns: where they lie, and what a fault of the disk means. A file that is damaged, whatever it holds
now, counts as absent; one that cannot be written (a full disk, a quota, a folder that became read-only)
is not written. Both cost a compilation and one line of warning, never a request. The only user of
numba's caching. A kernel is known by the content of its file, wherever that lies: another environment
or checkout of the same sources compiles nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserProvidedCacheLocator,
)

from common.logs import get_logger

log = get_logger("kernels")

_PROCESS = secrets.token_hex(4)
_DIGEST_BYTES = 32
# Of numba, which read them from the environment (NUMBA_OPT, …), and names no compiled file by them.
_OPTIONS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "USING_SVML")
_warned: set[str] = set()


def options() -> str:
    """Numba's options that lead to another machine code of the same kernel, and so to other bits."""
    return ",".join(repr(getattr(numba.config, name, None)) for name in _OPTIONS)


def directory(sources: Iterable[Path]) -> str:
    """Where compiled kernels are kept: one folder for one state of the kernels' sources, since
    numba itself only sees a change of the file that a kernel is in, not of what it calls, and of
    numba's options. Empty where no folder can be written that is ours alone."""
    digest = hashlib.blake2b(options().encode(), digest_size=8)
    for path in sources:
        digest.update(path.read_bytes())
    name = f"kernels-{digest.hexdigest()}"
    for parent in ("~/.cache/pdq", f"{tempfile.gettempdir()}/pdq-{os.getuid()}"):
        try:
            folder = Path(parent).expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = folder.stat().st_uid
        except (OSError, RuntimeError):  # the latter where the user has no home at all
            continue
        if os.access(folder, os.W_OK) and owner == os.getuid():
            return str(folder / name)
    _warn("no folder", "neither ~/.cache nor the temporary folder can be written")
    return ""


def cache(dispatcher: Any) -> None:
    """Let a kernel that `numba.njit` made be loaded from the cache folder, and saved there."""
    if not numba.config.CACHE_DIR:
        return
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except (OSError, RuntimeError) as error:  # numba: "no locator available"
        _warn("unusable", error)


class _Locator(UserProvidedCacheLocator):  # type: ignore[misc]
    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """The folder of a file's kernels; numba's own goes by the path of the file's folder."""
        path = Path(py_file)
        return f"{path.stem}_{hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}"

    def get_source_stamp(self) -> str:
        """What else must be the same for a kernel to be used, beside its file and numba's version."""
        return str(llvmlite.__version__)


class _Functions(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _Functions

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # numba raises whatever the bytes make it raise
            _warn("unreadable", error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn("unwritable", error)


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's files with a digest behind what it writes, which it does not read; the digest is
    checked before numba reads anything."""

    def __init__(self, folder: str, base: str, source_stamp: object) -> None:
        super().__init__(folder, base, source_stamp)
        # Numba numbers these files; two processes that fill an empty cache would take the same
        # number, and one find the other's code under its signature.
        self._data_name_pattern = f"{base}.{_PROCESS}.{{number:d}}.nbc"

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        path = self._data_path(name)
        if not _is_whole(path):
            raise OSError(f"{path} is damaged")  # which numba takes for absent
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, path: str) -> Iterator[Any]:
        """To another name at first, so that there is never half a file."""
        content = io.BytesIO()
        with super()._open_for_write(path) as file:
            yield content
            file.write(content.getvalue() + _digest(content.getvalue()))


def _is_whole(path: str) -> bool:
    """Whether the file holds what was written; one that is not there does not."""
    try:
        stored = Path(path).read_bytes()
    except OSError:
        return False
    if _digest(stored[:-_DIGEST_BYTES]) == stored[-_DIGEST_BYTES:]:
        return True
    _warn("damaged", path)
    return False


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _warn(kind: str, error: object) -> None:
    """Once for each kind of trouble: there are dozens of kernels."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning("kernels.not_cached", trouble=kind, error=error)
