"""One CUDA device, as pools and transports use it. The only user of libcudart.

Torch does all but this: a pool that another process may map must be one plain `cudaMalloc`, for torch's
allocator hands out parts of larger pieces, and expandable segments have no IPC handle at all. The
library is the one that torch has loaded, found by its name; nothing is compiled and nothing more is
installed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from common.errors import ConfigError, InsufficientMemory, LinkLost, PdqError

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: the handle may be of another device


class Stream(Protocol):
    """Copies in a row. `LinkLost` where the device fails."""

    @property
    def handle(self) -> int:
        """The cudaStream_t, for other libraries."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Asynchronous; both tensors must stay until `synchronize`."""

    def synchronize(self) -> None:
        """Wait until all work of the stream has ended; releases the GIL."""

    def is_done(self) -> bool:
        """Whether all work of the stream has ended."""


class Cuda(Protocol):
    """One device. Addresses are numbers."""

    index: int

    def malloc(self, length: int) -> int:
        """Zeroed device memory that has an IPC handle; `InsufficientMemory`."""

    def free(self, address: int) -> None: ...

    def tensor(self, address: int, shape: tuple[int, int]) -> Tensor:
        """Device memory as uint8; whoever holds the tensor keeps the memory."""

    def ipc_handle(self, address: int) -> bytes:
        """64 bytes with which another process maps what `malloc` gave."""

    def open_ipc(self, handle: bytes) -> int:
        """Map another process's memory; `LinkLost`."""

    def close_ipc(self, address: int) -> None: ...

    def pinned(self, length: int) -> Tensor:
        """Host bytes that a device copies at full speed; `InsufficientMemory`."""

    def stream(self) -> Stream: ...


class CudaRuntime:
    """`Cuda` by torch and libcudart. `ConfigError` where there is no such library or no device."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._device = torch.device("cuda", index)
        major = (torch.version.cuda or "").partition(".")[0]
        name = f"libcudart.so.{major}" if major else "libcudart.so"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise ConfigError(f"CUDA transports need {name}, which torch brings: {error}") from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call(ConfigError, "cudaGetDeviceCount", ctypes.byref(count))

    def _call(self, error: type[PdqError], function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            said = self._library.cudaGetErrorString(status).decode()
            self._library.cudaGetLastError()  # or the next caller gets it
            raise error(f"{function}: {said} ({status})")

    def _use(self) -> None:
        """Choose the device of this thread's next call."""
        self._call(LinkLost, "cudaSetDevice", self.index)

    def malloc(self, length: int) -> int:
        self._use()
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(length)
        self._call(InsufficientMemory, "cudaMalloc", ctypes.byref(address), size)
        assert address.value is not None
        self._call(InsufficientMemory, "cudaMemset", address, 0, size)
        self._call(InsufficientMemory, "cudaDeviceSynchronize")
        return address.value

    def free(self, address: int) -> None:
        self._use()
        self._call(LinkLost, "cudaFree", ctypes.c_void_p(address))

    def tensor(self, address: int, shape: tuple[int, int]) -> Tensor:
        return torch.as_tensor(_DeviceArray(address, shape), device=self._device)

    def ipc_handle(self, address: int) -> bytes:
        self._use()
        handle = _Handle()
        self._call(ConfigError, "cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open_ipc(self, handle: bytes) -> int:
        self._use()
        address = ctypes.c_void_p()
        self._call(
            LinkLost,
            "cudaIpcOpenMemHandle",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        assert address.value is not None
        return address.value

    def close_ipc(self, address: int) -> None:
        self._use()
        self._call(LinkLost, "cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def pinned(self, length: int) -> Tensor:
        self._use()  # or torch makes a context on the first device of all
        with _translated(InsufficientMemory):
            return torch.empty(length, dtype=torch.uint8, pin_memory=True)

    def stream(self) -> Stream:
        return _TorchStream(self._device)


class _TorchStream:
    def __init__(self, device: torch.device) -> None:
        with _translated(LinkLost):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    def copy(self, into: Tensor, source: Tensor) -> None:
        with _translated(LinkLost), torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        with _translated(LinkLost):
            self._stream.synchronize()

    def is_done(self) -> bool:
        with _translated(LinkLost):
            return bool(self._stream.query())


@contextlib.contextmanager
def _translated(error: type[PdqError]) -> Iterator[None]:
    """Torch's errors as ours."""
    try:
        yield
    except RuntimeError as failure:
        raise error(f"cuda: {failure}") from failure


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t: passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _DeviceArray:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
            "version": 3,
        }
