"""The few calls of the CUDA runtime that torch does not offer. The only user of libcudart.

A pool that another process may map must be one plain `cudaMalloc`: torch's allocator hands out
parts of larger pieces, and expandable segments have no IPC handle at all. The library is the one
that torch has loaded, found by its name; nothing is compiled and nothing more is installed.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from common.errors import ConfigError, InsufficientMemory, LinkLost, PdqError

HANDLE_BYTES = 64
_DEFAULT_KIND = 4  # cudaMemcpyDefault: the addresses say where they lie
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: the handle may be of another device
_NOT_READY = 600  # cudaErrorNotReady


class Cuda(Protocol):
    """What is used of a device. Addresses and streams are numbers; every copy is asynchronous."""

    def malloc(self, device: int, length: int) -> int:
        """Zeroed device memory that has an IPC handle; `InsufficientMemory`."""

    def free(self, device: int, address: int) -> None: ...

    def tensor(self, device: int, address: int, shape: tuple[int, int]) -> Tensor:
        """Device memory as uint8; whoever holds the tensor keeps the memory."""

    def ipc_handle(self, device: int, address: int) -> bytes:
        """64 bytes with which another process maps what `malloc` gave."""

    def open_ipc(self, device: int, handle: bytes) -> int:
        """Map another process's memory; `LinkLost`."""

    def close_ipc(self, device: int, address: int) -> None: ...

    def pinned(self, length: int) -> int:
        """Host memory that a device copies at full speed; `InsufficientMemory`."""

    def free_pinned(self, address: int) -> None: ...

    def stream(self, device: int) -> int: ...

    def destroy(self, device: int, stream: int) -> None: ...

    def copy(self, device: int, stream: int, target: int, source: int, length: int) -> None: ...

    def synchronize(self, device: int, stream: int) -> None:
        """Wait until all copies of the stream have ended; releases the GIL. `LinkLost`."""

    def is_done(self, device: int, stream: int) -> bool:
        """Whether all work of the stream has ended; `LinkLost` if it failed."""


class CudaRuntime:
    """`Cuda` by libcudart. `ConfigError` where there is no such library or no device."""

    def __init__(self) -> None:
        major = (torch.version.cuda or "").partition(".")[0]
        name = f"libcudart.so.{major}" if major else "libcudart.so"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise ConfigError(
                f"CUDA transports need {name}, which torch brings: {error}"
            ) from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call(ConfigError, "cudaGetDeviceCount", ctypes.byref(count))

    def _call(self, error: type[PdqError], function: str, *arguments: Any) -> None:
        self._check(error, function, getattr(self._library, function)(*arguments))

    def _check(self, error: type[PdqError], function: str, status: int) -> None:
        if status:
            said = self._library.cudaGetErrorString(status).decode()
            self._library.cudaGetLastError()  # or the next caller gets it
            raise error(f"{function}: {said} ({status})")

    def _use(self, device: int) -> None:
        """Choose the device of this thread's next call."""
        self._call(LinkLost, "cudaSetDevice", device)

    def malloc(self, device: int, length: int) -> int:
        self._use(device)
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(length)
        self._call(InsufficientMemory, "cudaMalloc", ctypes.byref(address), size)
        assert address.value is not None
        self._call(InsufficientMemory, "cudaMemset", address, 0, size)
        self._call(InsufficientMemory, "cudaDeviceSynchronize")
        return address.value

    def free(self, device: int, address: int) -> None:
        self._use(device)
        self._call(LinkLost, "cudaFree", ctypes.c_void_p(address))

    def tensor(self, device: int, address: int, shape: tuple[int, int]) -> Tensor:
        return torch.as_tensor(_DeviceArray(address, shape), device=f"cuda:{device}")

    def ipc_handle(self, device: int, address: int) -> bytes:
        self._use(device)
        handle = _Handle()
        self._call(
            ConfigError, "cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address)
        )
        return bytes(handle)

    def open_ipc(self, device: int, handle: bytes) -> int:
        self._use(device)
        address = ctypes.c_void_p()
        self._call(
            LinkLost, "cudaIpcOpenMemHandle", ctypes.byref(address),
            _Handle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS),
        )  # fmt: skip
        assert address.value is not None
        return address.value

    def close_ipc(self, device: int, address: int) -> None:
        self._use(device)
        self._call(LinkLost, "cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def pinned(self, length: int) -> int:
        address = ctypes.c_void_p()
        self._call(
            InsufficientMemory, "cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(length), 0
        )
        assert address.value is not None
        return address.value

    def free_pinned(self, address: int) -> None:
        self._call(LinkLost, "cudaFreeHost", ctypes.c_void_p(address))

    def stream(self, device: int) -> int:
        self._use(device)
        stream = ctypes.c_void_p()
        self._call(
            InsufficientMemory, "cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING
        )
        assert stream.value is not None
        return stream.value

    def destroy(self, device: int, stream: int) -> None:
        self._use(device)
        self._call(LinkLost, "cudaStreamDestroy", ctypes.c_void_p(stream))

    def copy(self, device: int, stream: int, target: int, source: int, length: int) -> None:
        self._use(device)
        self._call(
            LinkLost, "cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source),
            ctypes.c_size_t(length), _DEFAULT_KIND, ctypes.c_void_p(stream),
        )  # fmt: skip

    def synchronize(self, device: int, stream: int) -> None:
        self._use(device)
        self._call(LinkLost, "cudaStreamSynchronize", ctypes.c_void_p(stream))

    def is_done(self, device: int, stream: int) -> bool:
        self._use(device)
        status = self._library.cudaStreamQuery(ctypes.c_void_p(stream))
        if status == _NOT_READY:
            return False
        self._check(LinkLost, "cudaStreamQuery", status)
        return True


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t: passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _DeviceArray:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": "|u1", "version": 3,
        }  # fmt: skip
