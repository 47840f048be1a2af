"""Compiled kernels on disk: numba's files, but none of them is trusted, and none is needed.

Owns: where they lie, and what a fault of the disk means. A file that is damaged, whatever it holds
now, counts as absent; one that cannot be written (a full disk, a quota, a folder that became read-only)
is not written. Both cost a compilation and one line of warning, never a request. The only user of
numba's caching. A kernel is known by the content of its file, wherever that lies: another environment
or checkout of the same sources compiles nothing.

Processes that start together share the work: who needs a kernel that another one compiles waits for it, and
says so. A lock ends with its process; nobody waits for long for one that hangs, nor for one that cannot
write the kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import os
import secrets
import time
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
from numba.core.registry import cpu_target

from common.cache_folder import cache_folder
from common.logs import get_logger

log = get_logger("kernels")

_PROCESS = secrets.token_hex(4)
_DIGEST_BYTES = 32
LONGEST_WAIT_S = 60.0  # for one kernel that another process compiles
_LOOK_S = 0.02
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
    folder = cache_folder()
    if folder is None:
        _warn("no folder", "neither ~/.cache nor the temporary folder can be written")
        return ""
    return str(folder / f"kernels-{digest.hexdigest()}")


def cache(dispatcher: Any) -> None:
    """Let a kernel that `numba.njit` made be loaded from the cache folder, and saved there."""
    if not numba.config.CACHE_DIR:
        return
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except (OSError, RuntimeError) as error:  # numba: "no locator available"
        _warn("unusable", error)


def is_new(dispatcher: Any) -> bool:
    """Whether a kernel was never compiled here, for any signature, and can be kept."""
    cache = dispatcher._cache
    return isinstance(cache, _Cache) and not cache.is_used()


@contextlib.contextmanager
def compiling(dispatcher: Any, signature: Any) -> Iterator[None]:
    """While a kernel is loaded or, where the cache lacks it, compiled: in one process of this machine. The
    others wait here. A line says that it is compiled, or waited for."""
    cache = dispatcher._cache
    with contextlib.ExitStack() as stack:
        if isinstance(cache, _Cache):
            if cache.has(signature):
                return (yield)
            stack.enter_context(cache.locked(signature))
            if cache.has(signature):
                return (yield)
        # A warning, for whoever computes waits; `pdq serve` shows it as the progress of a start.
        log.warning("kernels.compiling", kernel=dispatcher.py_func.__name__)
        yield


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
        self._lock: Path | None = None  # that we hold

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        self._cache_file = self._files(signature)
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # numba raises whatever the bytes make it raise
            _warn("unreadable", error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        self._cache_file = self._files(signature)
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn("unwritable", error)
            if self._lock is not None:  # whoever waits for the kernel need not do so any longer
                with contextlib.suppress(OSError):
                    self._lock.unlink()

    def is_used(self) -> bool:
        return any(Path(self._cache_path).glob(f"{glob.escape(self._impl.filename_base)}.*.nbi"))

    def has(self, signature: Any) -> bool:
        return self._files(signature).has(self._key(signature))

    @contextlib.contextmanager
    def locked(self, signature: Any) -> Iterator[None]:
        """No other process is in here, but where nothing can be locked, and after LONGEST_WAIT_S."""
        path = Path(self._cache_path, f"{self._name_of(signature)}.lock")
        try:
            self._impl.locator.ensure_cache_path()
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _warn("unwritable", error)
            yield
            return
        try:
            self._lock = path if _take(file, self._py_func.__name__) else None
            yield
        finally:
            self._lock = None
            os.close(file)

    def _files(self, signature: Any) -> _Files:
        """Each signature has its own, so that no process overwrites what another one has added."""
        stamp = self._impl.locator.get_source_stamp()
        return _Files(self._cache_path, self._name_of(signature), stamp)

    def _name_of(self, signature: Any) -> str:
        digest = _digest(repr(self._key(signature)).encode()).hex()[:16]
        return f"{self._impl.filename_base}.{digest}"

    def _key(self, signature: Any) -> object:
        return self._index_key(signature, cpu_target.target_context.codegen())


def _take(file: int, kernel: str) -> bool:
    """Wait for the lock of an open file. False where it cannot be had, or is worth nothing: a process that
    could not write the kernel has deleted the file."""
    started, waits = time.monotonic(), False
    while time.monotonic() - started < LONGEST_WAIT_S:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:  # a file system without locks
            _warn("unlocked", error)
            return False
        else:
            if os.fstat(file).st_nlink:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
        if not waits:
            waits = True
            log.warning("kernels.waiting", kernel=kernel, reason="another process compiles it")
        time.sleep(_LOOK_S)
    log.warning("kernels.waited_in_vain", kernel=kernel, seconds=LONGEST_WAIT_S)
    return False


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's files of one kernel and signature, with a digest behind what it writes, which it does not
    read; the digest is checked before numba reads anything."""

    def __init__(self, folder: str, base: str, source_stamp: object) -> None:
        super().__init__(folder, base, source_stamp)
        # Two processes that compile the same must not write to one file.
        self._data_name_pattern = f"{base}.{_PROCESS}.{{number:d}}.nbc"

    def has(self, key: object) -> bool:
        """Whether the kernel is there, as it was written; not whether it can be used."""
        try:
            name = self._load_index().get(key)
        except Exception:  # whatever the bytes make it raise, which loading will say
            return False
        return name is not None and _is_whole(self._data_path(name))

    def save(self, key: object, data: object) -> None:
        """The index last: what it names is there."""
        name = self._load_index().get(key) or self._data_name(1)
        self._save_data(name, data)
        self._save_index({key: name})

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
