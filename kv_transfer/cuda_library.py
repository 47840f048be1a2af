"""The calls of libcudart that we make, of CUDA 12 and 13. The only user of that library.

Each function is bound twice. `quick` keeps the GIL: for calls that return at once, because to give the GIL
up and ask for it again can cost 5 ms for each call while other threads compute. `waits` gives it up: for
calls that wait for the device, or take memory. Signatures are those of `cuda_runtime_api.h`, which a test
compares where that file is installed. Knows no streams, pools or errors of ours but one.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import torch

from common.errors import ConfigError, PdqError

HANDLE_BYTES = 64
BATCH_VERSION = 12080  # since which runtimes and drivers have cudaMemcpyBatchAsync
NOT_READY = 600  # cudaErrorNotReady


class IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t: passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class MemoryLocation(ctypes.Structure):
    """cudaMemLocation: only a hint, for memory that is nowhere in particular."""

    _fields_ = (("type", c_int), ("id", c_int))


class CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("srcAccessOrder", c_int),
        ("srcLocHint", MemoryLocation),
        ("dstLocHint", MemoryLocation),
        ("flags", c_uint),
    )


IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
OVERLAP_COMPUTE = 1  # cudaMemcpyFlagPreferOverlapWithCompute
NON_BLOCKING = 1  # cudaStreamNonBlocking: the legacy default stream waits for no such stream
RELAXED = 2  # cudaStreamCaptureModeRelaxed
DEFAULT_KIND = 4  # cudaMemcpyDefault: addresses say where they are
PORTABLE = 1  # cudaHostAllocPortable
LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: the handle may be of another device

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaRuntimeGetVersion": (POINTER(c_int),),
    "cudaDriverGetVersion": (POINTER(c_int),),
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaSetDevice": (c_int,),
    "cudaDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cudaGetLastError": (),
    "cudaThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cudaMemsetAsync": (c_void_p, c_int, c_size_t, c_void_p),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaIpcGetMemHandle": (POINTER(IpcHandle), c_void_p),
    "cudaIpcOpenMemHandle": (POINTER(c_void_p), IpcHandle, c_uint),
    "cudaIpcCloseMemHandle": (c_void_p,),
    "cudaStreamCreateWithFlags": (POINTER(c_void_p), c_uint),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamQuery": (c_void_p,),
}
_BATCH = (c_void_p, c_void_p, c_void_p, c_size_t, POINTER(CopyAttributes), POINTER(c_size_t), c_size_t)


def batch_signature(runtime: int) -> tuple[Any, ...]:
    """Of cudaMemcpyBatchAsync, by the version of the runtime: 13.0 took `failIdx` away."""
    return (*_BATCH, POINTER(c_size_t), c_void_p) if runtime < 13000 else (*_BATCH, c_void_p)


class CudaLibrary:
    """Functions by their names, `quick` and `waits`. `ConfigError` where there is no such library."""

    def __init__(self, name: str = "") -> None:
        """`name`: of the library; "" means the one that torch has loaded."""
        if not name:
            major = (torch.version.cuda or "").partition(".")[0]
            name = f"libcudart.so.{major}" if major else "libcudart.so"
        self.quick: Any
        self.waits: Any
        try:
            self.quick, self.waits = ctypes.PyDLL(name), ctypes.CDLL(name)
        except OSError as error:
            raise ConfigError(f"CUDA transports need {name}, which torch brings: {error}") from error
        for library in (self.quick, self.waits):
            library.cudaGetErrorString.restype = c_char_p
        for function, arguments in SIGNATURES.items():
            self._declare(function, arguments)
        self.runtime = self._version("cudaRuntimeGetVersion")
        self.driver = self._version("cudaDriverGetVersion")  # 0 without one
        if self.runtime >= BATCH_VERSION:
            self._declare("cudaMemcpyBatchAsync", batch_signature(self.runtime))

    def give_way(self) -> None:
        """Let every call give the GIL up, from now on: where a call of the driver may wait for another thread
        that waits for the device, and what the device waits for is ended by a third one in Python."""
        self.quick = self.waits

    def _declare(self, function: str, arguments: tuple[Any, ...]) -> None:
        for library in (self.quick, self.waits):
            getattr(library, function).argtypes = arguments

    def _version(self, function: str) -> int:
        found = c_int()
        self.check(ConfigError, function, getattr(self.quick, function)(ctypes.byref(found)))
        return found.value

    @property
    def has_batches(self) -> bool:
        """Whether runtime and driver have cudaMemcpyBatchAsync."""
        return min(self.runtime, self.driver) >= BATCH_VERSION

    def check(self, error: type[PdqError], function: str, status: int) -> None:
        """Raise `error` for a status that is one."""
        if status:
            said = self.quick.cudaGetErrorString(status).decode()
            self.quick.cudaGetLastError()  # or the next caller gets it
            raise error(f"{function}: {said} ({status})")

    def copy_batch(self, into: int, source: int, lengths: int, count: int, stream: int) -> int:
        """cudaMemcpyBatchAsync, of arrays at these addresses; its status."""
        attributes = CopyAttributes(srcAccessOrder=IN_STREAM_ORDER, flags=OVERLAP_COMPUTE)
        first, failed = c_size_t(0), c_size_t()
        call = self.quick.cudaMemcpyBatchAsync
        before = (into, source, lengths, count, ctypes.byref(attributes), ctypes.byref(first), 1)
        if self.runtime < 13000:
            return int(call(*before, ctypes.byref(failed), stream))
        return int(call(*before, stream))
