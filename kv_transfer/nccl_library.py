"""Communicators of two ranks that never block. The only user of libnccl.

The library is the one that torch has loaded, found by its name. Making a communicator does not wait for
the peer (`blocking=0`): callers ask whether it is ready, and may abort it at any moment. After `abort`
none of its kernels runs, and the memory that it was receiving into is free again.

As in cuda_library.py, `quick` keeps the GIL and `waits` gives it up. Between ncclGroupStart and
ncclGroupEnd a send or a receive is only written down; ncclGroupEnd connects and launches.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_int, c_size_t, c_void_p
from typing import Any, Protocol

import torch

from common.errors import ConfigError, LinkLost, PdqError

ID_BYTES = 128
_UINT8 = 1  # ncclUint8
_IN_PROGRESS = 7  # ncclInProgress
_UNDEFINED = -(2**31)
_CONFIG_VERSION = 21801  # whose ncclConfig_t is below; later libraries accept a shorter one

Ranges = Sequence[tuple[int, int]]  # device address, length


class Communicator(Protocol):
    """One end of a pair. Methods belong to one thread; all return at once."""

    def is_ready(self) -> bool:
        """Whether the last call has been set up; `LinkLost` if it failed."""

    def exchange(self, ranges: Ranges, stream: int, *, send: bool) -> None:
        """Put one send or receive of all ranges on a stream; `is_ready` says when it is there."""

    def abort(self) -> None:
        """End the communicator and whatever it has under way. May be called twice."""


class Nccl(Protocol):
    def unique_id(self) -> bytes:
        """128 bytes with which two ranks find each other."""

    def communicator(self, device: int, unique_id: bytes, rank: int) -> Communicator: ...


class _Id(ctypes.Structure):
    """ncclUniqueId: passed by value."""

    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t, as of 2.18."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


_SEND = (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetUniqueId": (POINTER(_Id),),
    "ncclCommInitRankConfig": (POINTER(c_void_p), c_int, _Id, c_int, POINTER(_Config)),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclCommAbort": (c_void_p,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": _SEND,
    "ncclRecv": _SEND,
}


class NcclLibrary:
    """`Nccl` by libnccl. `ConfigError` where there is none."""

    def __init__(self, name: str = "libnccl.so.2") -> None:
        self.quick: Any
        self.waits: Any
        try:
            self.quick, self.waits = ctypes.PyDLL(name), ctypes.CDLL(name)
        except OSError as error:
            raise ConfigError(
                f"the nccl transport needs {name}, which torch for CUDA brings: {error}"
            ) from error
        self.quick.ncclGetErrorString.restype = ctypes.c_char_p
        for function, arguments in SIGNATURES.items():
            for library in (self.quick, self.waits):
                getattr(library, function).argtypes = arguments

    def check(self, error: type[PdqError], function: str, status: int) -> None:
        if status not in (0, _IN_PROGRESS):
            said = self.quick.ncclGetErrorString(status).decode()
            raise error(f"{function}: {said} ({status})")

    def unique_id(self) -> bytes:
        unique = _Id()
        status = self.waits.ncclGetUniqueId(ctypes.byref(unique))
        self.check(LinkLost, "ncclGetUniqueId", status)
        return ctypes.string_at(ctypes.byref(unique), ID_BYTES)  # with its zero bytes

    def communicator(self, device: int, unique_id: bytes, rank: int) -> Communicator:
        return _Pair(self, device, unique_id, rank)


class _Pair:
    def __init__(self, library: NcclLibrary, device: int, unique_id: bytes, rank: int) -> None:
        self._library, self._peer, self._device = library, 1 - rank, device
        self._pair = ctypes.c_void_p()
        self._lock = threading.Lock()
        config = _Config(
            ctypes.sizeof(_Config),
            0xCAFEBEEF,
            _CONFIG_VERSION,
            0,
            _UNDEFINED,
            _UNDEFINED,
            _UNDEFINED,
            None,
            _UNDEFINED,
        )
        torch.cuda.set_device(device)  # of this thread
        status = library.waits.ncclCommInitRankConfig(
            ctypes.byref(self._pair), 2, _Id.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        try:
            library.check(LinkLost, "ncclCommInitRankConfig", status)
        except BaseException:
            self.abort()  # of what was made until then
            raise

    def is_ready(self) -> bool:
        state = ctypes.c_int()
        status = self._library.quick.ncclCommGetAsyncError(self._pair, ctypes.byref(state))
        self._library.check(LinkLost, "ncclCommGetAsyncError", status)
        self._library.check(LinkLost, "nccl", state.value)
        return state.value != _IN_PROGRESS

    def exchange(self, ranges: Ranges, stream: int, *, send: bool) -> None:
        library = self._library
        one = library.quick.ncclSend if send else library.quick.ncclRecv
        torch.cuda.set_device(self._device)
        library.check(LinkLost, "ncclGroupStart", library.quick.ncclGroupStart())
        statuses = [one(at, length, _UINT8, self._peer, self._pair, stream) for at, length in ranges]
        library.check(LinkLost, "ncclGroupEnd", library.waits.ncclGroupEnd())
        for status in statuses:
            library.check(LinkLost, "ncclSend" if send else "ncclRecv", status)

    def abort(self) -> None:
        with self._lock:
            if self._pair:
                self._library.waits.ncclCommAbort(self._pair)
                self._pair = ctypes.c_void_p()
