"""What is called of libcudart and libnccl, and how: without a device, or with the real libraries.

The libraries of NVIDIA's packages (nvidia-cuda-runtime-cu12, nvidia-cuda-runtime, nvidia-nccl-cu12) are found
on `sys.path`, with their headers; what needs them is skipped where they are not. Without a driver every call
of theirs says so, which is an error path that really runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, InsufficientMemory, LinkLost
from kv_transfer import cuda_runtime, nccl_library
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import Between
from kv_transfer.cuda_library import (
    DEFAULT_KIND,
    HANDLE_BYTES,
    IN_STREAM_ORDER,
    LAZY_PEER_ACCESS,
    NON_BLOCKING,
    NOT_READY,
    OVERLAP_COMPUTE,
    PORTABLE,
    RELAXED,
    SIGNATURES,
    CopyAttributes,
    CudaLibrary,
    IpcHandle,
    batch_signature,
)
from kv_transfer.cuda_runtime import CALL_COPIES, TABLE_COPIES, CudaRuntime
from kv_transfer.nccl_library import NcclLibrary


def installed(pattern: str) -> list[Path]:
    return [found for folder in sys.path for found in sorted(Path(folder, "nvidia").glob(pattern))]


RUNTIMES = [*installed("*/lib/libcudart.so.1[23]")]
NCCLS = [*installed("nccl/lib/libnccl.so.2")]
real_runtimes = pytest.mark.parametrize(
    "path",
    RUNTIMES
    or [
        pytest.param(
            Path(),
            marks=pytest.mark.skip(
                reason="no libcudart (pip install nvidia-cuda-runtime-cu12 or nvidia-cuda-runtime)"
            ),
        )
    ],
    ids=lambda path: path.name,
)

KINDS = {  # of a parameter in C: what its type must be
    ctypes.c_int: re.compile(r"^(int|enum cudaMemcpyKind|ncclDataType_t)$"),
    ctypes.c_uint: re.compile(r"^unsigned int$"),
    ctypes.c_size_t: re.compile(r"^size_t$"),
    ctypes.c_char_p: re.compile(r"^char ?\*$"),
    IpcHandle: re.compile(r"^cudaIpcMemHandle_t$"),
    nccl_library._Id: re.compile(r"^ncclUniqueId$"),
}
OPAQUE = ("cudaStream_t", "ncclComm_t")  # pointers by another name


def parameters(header: str, function: str) -> list[str]:
    """The types of a function's parameters, without their names, defaults and `const`."""
    declared = re.search(
        rf"(?:CUDARTAPI|ncclResult_t)\s+{function}\(([^)]*(?:\([^)]*\))?[^)]*)\)\s*;", header
    )
    assert declared is not None, function
    found = []
    for parameter in declared[1].replace("\n", " ").split(","):
        text = re.sub(r"__dv\(.*|\bconst\b|\bstruct\b", "", parameter).strip()
        if text and text != "void":
            found.append(re.sub(r"\s*\w+$", "", text).strip().replace(" *", "*"))
    return found


def agrees(kind: Any, declared: str) -> bool:
    if kind in KINDS:
        return bool(KINDS[kind].match(declared))
    return declared.endswith("*") or declared in OPAQUE


@real_runtimes
def test_signatures_are_those_of_the_header(path: Path) -> None:
    header = (path.parents[1] / "include" / "cuda_runtime_api.h").read_text()
    version = re.search(r"#define CUDART_VERSION\s+(\d+)", header)
    assert version is not None
    batch = {"cudaMemcpyBatchAsync": batch_signature(int(version[1]))} if int(version[1]) >= 12080 else {}
    for function, ours in {**SIGNATURES, **batch}.items():
        theirs = parameters(header, function)
        assert len(ours) == len(theirs), function
        assert all(agrees(*pair) for pair in zip(ours, theirs, strict=True)), (function, theirs)


@real_runtimes
def test_constants_and_structures_are_those_of_the_header(path: Path) -> None:
    text = (path.parents[1] / "include" / "driver_types.h").read_text()
    for name, value in {
        "cudaErrorNotReady": NOT_READY,
        "cudaMemcpySrcAccessOrderStream": IN_STREAM_ORDER,
        "cudaMemcpyFlagPreferOverlapWithCompute": OVERLAP_COMPUTE,
        "cudaStreamCaptureModeRelaxed": RELAXED,
        "cudaMemcpyDefault": DEFAULT_KIND,
    }.items():
        assert re.search(rf"\b{name}\s*=\s*(0x)?{value}\b", text), name
    for name, value in {
        "cudaStreamNonBlocking": NON_BLOCKING,
        "cudaHostAllocPortable": PORTABLE,
        "cudaIpcMemLazyEnablePeerAccess": LAZY_PEER_ACCESS,
    }.items():
        assert re.search(rf"#define {name}\s+0x0?{value}\b", text), name
    assert re.search(rf"#define CUDA_IPC_HANDLE_SIZE {HANDLE_BYTES}\b", text)
    attributes = re.search(r"cudaMemcpyAttributes \{(.*?)\}", text, re.DOTALL)
    assert attributes is not None
    fields = re.findall(r"(\w+);", attributes[1])
    assert fields == [name for name, _ in CopyAttributes._fields_]
    assert ctypes.sizeof(CopyAttributes) == 24


@real_runtimes
def test_the_real_library_has_every_symbol_and_says_that_there_is_no_driver(path: Path) -> None:
    library = CudaLibrary(str(path))
    assert library.runtime // 1000 == int(path.name[-2:])
    if library.driver:
        pytest.skip("this machine has a driver")
    assert not library.has_batches
    with pytest.raises(ConfigError, match=r"cudaGetDeviceCount: .*driver.* \(35\)"):
        CudaRuntime(library=library)
    if library.runtime >= 12080:
        numbers = np.zeros(1, np.int64)
        at = numbers.ctypes.data
        assert library.copy_batch(at, at, at, 1, 0) == 35


@pytest.mark.skipif(not NCCLS, reason="no libnccl (pip install nvidia-nccl-cu12)")
def test_nccls_signatures_are_those_of_its_header_and_an_id_is_made() -> None:
    (path,) = NCCLS
    header = (path.parents[1] / "include" / "nccl.h").read_text()
    for function, ours in nccl_library.SIGNATURES.items():
        theirs = parameters(header, function)
        assert len(ours) == len(theirs), function
        assert all(agrees(*pair) for pair in zip(ours, theirs, strict=True)), (function, theirs)
    fields = re.search(r"typedef struct ncclConfig_v\d+ \{(.*?)\} ncclConfig_t", header, re.DOTALL)
    assert fields is not None
    names = re.findall(r"^\s+[\w ]+?\*?\s*\*?(\w+);", fields[1], re.MULTILINE)
    ours_in_theirs = [
        "size",
        "magic",
        "version",
        "blocking",
        "cgaClusterSize",
        "minCTAs",
        "maxCTAs",
        "netName",
        "splitShare",
    ]
    assert names[: len(ours_in_theirs)] == ours_in_theirs
    assert len(nccl_library._Config._fields_) == len(ours_in_theirs)
    assert len(NcclLibrary(str(path)).unique_id()) == nccl_library.ID_BYTES


# The runtime, with a library that is not there


class FakeFunctions:
    """One binding of `FakeLibrary`: notes whether the GIL would have been kept."""

    def __init__(self, library: FakeLibrary, kept: bool) -> None:
        self._library, self._kept = library, kept

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            return self._library.called(function, self._kept, arguments)

        return call


class FakeLibrary(CudaLibrary):
    """Memory is the host's; a copy is done at once; what must hold of calls is checked at each."""

    WAITS = frozenset(
        [
            "cudaMalloc",
            "cudaFree",
            "cudaHostAlloc",
            "cudaStreamSynchronize",
            "cudaIpcOpenMemHandle",
            "cudaIpcCloseMemHandle",
            "cudaMemsetAsync",
            "cudaStreamCreateWithFlags",
            "cudaIpcGetMemHandle",
            "cudaDeviceGetPCIBusId",
            "cudaGetDeviceCount",
        ]
    )

    def __init__(self, *, runtime: int = 12090, driver: int = 13000) -> None:
        self.quick, self.waits = FakeFunctions(self, True), FakeFunctions(self, False)
        self.runtime, self.driver = runtime, driver
        self.calls: list[str] = []
        self.fails: dict[str, int] = {}  # function → status of its next call
        self.modes = threading.local()  # of each thread
        self.memory: list[Any] = []
        self.busy = 0  # looks for which a stream has not ended

    def check(self, error: type[Any], function: str, status: int) -> None:
        if status:
            raise error(f"{function}: pretended ({status})")

    def called(self, function: str, kept: bool, arguments: tuple[Any, ...]) -> int:
        if function == "cudaThreadExchangeStreamCaptureMode":
            cell = arguments[0]._obj
            cell.value, self.modes.now = getattr(self.modes, "now", 0), cell.value
            return 0
        if function == "cudaGetLastError":
            return 0
        self.calls.append(function)
        if function not in ("cudaSetDevice", "cudaGetDeviceCount"):
            assert getattr(self.modes, "now", 0) == RELAXED, f"{function} would end another's capture"
            assert kept == (function not in self.WAITS), function
        if status := self.fails.pop(function, 0):
            return status
        return getattr(self, function, lambda *_: 0)(*arguments)

    def cudaMalloc(self, address: Any, length: int) -> int:
        self.memory.append(ctypes.create_string_buffer(length + 16))
        address._obj.value = -(-ctypes.addressof(self.memory[-1]) // 16) * 16
        return 0

    def cudaHostAlloc(self, address: Any, length: int, flags: int) -> int:
        return self.cudaMalloc(address, length)

    def cudaStreamCreateWithFlags(self, handle: Any, flags: int) -> int:
        assert flags == 1
        handle._obj.value = 1000 + len(self.calls)
        return 0

    def cudaStreamQuery(self, handle: int) -> int:
        self.busy -= 1
        return NOT_READY if self.busy >= 0 else 0

    def cudaMemcpyAsync(self, into: int, source: int, length: int, kind: int, stream: int) -> int:
        assert kind == 4
        assert stream
        ctypes.memmove(into, source, length)
        return 0

    def cudaMemcpyBatchAsync(self, into: int, source: int, lengths: int, count: int, *rest: Any) -> int:
        attributes, first, num_attributes, *failed, stream = rest
        assert attributes._obj.srcAccessOrder == 1
        assert (first._obj.value, num_attributes, len(failed)) == (0, 1, int(self.runtime < 13000))
        assert stream
        columns = [
            np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(at)) for at in (into, source, lengths)
        ]
        for copy in zip(*columns, strict=True):
            ctypes.memmove(*(int(number) for number in copy))
        return 0


Launches = list[tuple[int, int]]


@contextlib.contextmanager
def runtime(
    monkeypatch: pytest.MonkeyPatch, *, kernels: bool, **versions: int
) -> Iterator[tuple[CudaRuntime, FakeLibrary, Launches]]:
    library, launches = FakeLibrary(**versions), []

    def launch(table: int, count: int, longest: int, stream: int) -> None:
        rows = np.ctypeslib.as_array((ctypes.c_int64 * (3 * count)).from_address(table)).reshape(3, count)
        assert longest == int(rows[2].max())
        launches.append((count, stream))
        for copy in rows.T.tolist():
            ctypes.memmove(*copy)

    made = {True: launch, False: launch} if kernels else None
    monkeypatch.setattr(cuda_runtime, "_load_kernels", lambda: made)
    cuda = CudaRuntime(library=library)
    library.calls.clear()
    yield cuda, library, launches
    assert getattr(library.modes, "now", 0) == 0, "the thread has its own mode again"


def some_copies(count: int, length: int = 32) -> tuple[CopyBatch, Callable[[], bool]]:
    """Copies of which no two are neighbours, and whether they have happened."""
    source = np.random.default_rng(1).integers(0, 256, (count, length)).astype(np.uint8)
    into = np.zeros((count, 2 * length), np.uint8)
    order = np.random.default_rng(2).permutation(count)
    made = CopyBatch.of_ranges(
        into.ctypes.data + order * 2 * length, source.ctypes.data + np.arange(count) * length, [(0, length)]
    )
    return made, lambda: bool((into[order, :length] == source).all() and not into[:, length:].any())


@pytest.mark.parametrize("version", [12080, 12090, 13000, 13050])
@pytest.mark.parametrize("between", [Between.HOST, Between.ONE_DEVICE])
def test_a_batch_is_one_call_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, version: int, between: Between
) -> None:
    with runtime(monkeypatch, kernels=False, runtime=version, driver=version) as (cuda, library, _):
        stream = cuda.stream()
        copies, have_happened = some_copies(64)
        library.calls.clear()
        stream.copy(copies, between)
        assert library.calls == ["cudaSetDevice", "cudaMemcpyBatchAsync"]
        assert have_happened()


@pytest.mark.parametrize("versions", [(12060, 13000), (12090, 12040)])
def test_without_such_a_call_neighbours_become_one_copy_and_the_others_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, versions: tuple[int, int]
) -> None:
    """An old runtime, or an old driver under a new one."""
    with runtime(monkeypatch, kernels=False, runtime=versions[0], driver=versions[1]) as (cuda, library, _):
        stream = cuda.stream()
        copies, have_happened = some_copies(8)
        library.calls.clear()
        stream.copy(copies, Between.HOST)
        assert library.calls == ["cudaSetDevice", *["cudaMemcpyAsync"] * 8]
        assert have_happened()
        source, into = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        starts = np.arange(8) * 8
        library.calls.clear()
        stream.copy(
            CopyBatch.of_ranges(into.ctypes.data + starts, source.ctypes.data + starts, [(0, 8)]),
            Between.HOST,
        )
        assert library.calls.count("cudaMemcpyAsync") == 1
        assert (source == into).all()


def test_inside_a_device_a_batch_is_one_table_and_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(monkeypatch, kernels=True) as (cuda, library, launches):
        stream = cuda.stream()
        copies, have_happened = some_copies(300)
        library.calls.clear()
        stream.copy(copies, Between.ONE_DEVICE)
        assert library.calls == ["cudaSetDevice", "cudaMemcpyAsync"]
        assert launches == [(300, stream.handle)]
        assert have_happened()


@pytest.mark.parametrize(("length", "launched"), [(32, True), (512 << 10, False)])
def test_between_devices_the_kernel_copies_what_is_small(
    monkeypatch: pytest.MonkeyPatch, length: int, launched: bool
) -> None:
    with runtime(monkeypatch, kernels=True) as (cuda, _, launches):
        copies, have_happened = some_copies(4, length)
        cuda.stream().copy(copies, Between.DEVICES)
        assert bool(launches) == launched
        assert have_happened()


def test_a_table_is_not_written_again_before_its_launch_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(monkeypatch, kernels=True) as (cuda, library, launches):
        stream = cuda.stream()
        library.calls.clear()
        copies, have_happened = some_copies(TABLE_COPIES + 5)
        stream.copy(copies, Between.ONE_DEVICE)
        assert [count for count, _ in launches] == [TABLE_COPIES, 5]
        waits = library.calls.index("cudaStreamSynchronize")
        assert library.calls.count("cudaMemcpyAsync") == 2
        assert library.calls.index("cudaMemcpyAsync") < waits < len(library.calls) - 2
        assert have_happened()


def test_a_call_that_keeps_the_interpreter_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(monkeypatch, kernels=False) as (cuda, library, _):
        copies, have_happened = some_copies(2 * CALL_COPIES + 1)
        cuda.stream().copy(copies, Between.HOST)
        assert library.calls.count("cudaMemcpyBatchAsync") == 3
        assert have_happened()


def test_beside_kernels_that_wait_for_a_peer_no_call_keeps_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else: an abort waits for the device, and holds the driver's lock; a copy waits for that lock, and holds
    the interpreter's; and the thread that would abort what the device waits for waits for the interpreter."""
    with runtime(monkeypatch, kernels=True) as (cuda, library, _):
        cuda.give_way()
        library.WAITS = AllOf()  # type: ignore[misc, assignment]
        copies, have_happened = some_copies(8)
        with contextlib.closing(cuda.stream()) as stream:
            stream.copy(copies, Between.HOST)
            stream.copy(copies, Between.ONE_DEVICE)
            assert stream.is_done()
        assert have_happened()
        assert {"cudaMemcpyBatchAsync", "cudaMemcpyAsync", "cudaStreamQuery"} <= set(library.calls)


class AllOf:
    def __contains__(self, function: str) -> bool:
        return True


def test_what_a_stream_and_a_link_needed_serves_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from the device a second time, and nothing is freed, which would wait for it."""
    with runtime(monkeypatch, kernels=True) as (cuda, library, _):

        def use() -> None:
            pinned, scratch, stream = cuda.pinned(70_000), cuda.scratch(70_000), cuda.stream()
            assert len(pinned.view) >= 70_000
            stream.synchronize()
            stream.close()
            stream.close()
            cuda.give_pinned(pinned)
            cuda.give_scratch(scratch)

        use()
        library.calls.clear()
        use()
        assert set(library.calls) == {"cudaSetDevice", "cudaStreamSynchronize"}


def test_a_stream_with_work_serves_nobody_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(monkeypatch, kernels=False) as (cuda, library, _):
        stream = cuda.stream()
        handle = stream.handle
        library.busy = 1
        stream.close()
        assert cuda.stream().handle != handle


def test_an_error_is_told_with_its_call_and_ends_what_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(monkeypatch, kernels=False) as (cuda, library, _):
        library.fails["cudaMalloc"] = 2
        with pytest.raises(InsufficientMemory, match=r"cudaMalloc: pretended \(2\)"):
            cuda.malloc(64)
        library.fails["cudaStreamSynchronize"] = 700
        library.calls.clear()
        with pytest.raises(InsufficientMemory):
            cuda.malloc(64)
        assert library.calls[-1] == "cudaFree"
        library.fails["cudaMemcpyBatchAsync"] = 700
        with pytest.raises(LinkLost, match="cudaMemcpyBatchAsync"):
            cuda.stream().copy(some_copies(3)[0], Between.HOST)


class FakeNcclFunctions:
    """Both bindings of a libnccl that is not there: what is called, and whether the GIL would be kept."""

    def __init__(self, calls: list[tuple[str, bool]], kept: bool, statuses: dict[str, list[int]]) -> None:
        self._calls, self._kept, self._statuses = calls, kept, statuses

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self._calls.append((function, self._kept))
            if function == "ncclCommInitRankConfig":
                arguments[0]._obj.value = 77
            waiting = self._statuses.get(function)
            return waiting.pop(0) if waiting else 0

        return call

    def ncclGetErrorString(self, status: int) -> bytes:
        return b"pretended"


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> tuple[NcclLibrary, list[tuple[str, bool]], dict[str, list[int]]]:
    calls: list[tuple[str, bool]] = []
    statuses: dict[str, list[int]] = {}
    monkeypatch.setattr(nccl_library.torch.cuda, "set_device", lambda _: None)
    library = object.__new__(NcclLibrary)
    library.quick, library.waits = (FakeNcclFunctions(calls, kept, statuses) for kept in (True, False))
    return library, calls, statuses


IN_PROGRESS, SYSTEM_ERROR = 7, 2
Nccl = tuple[NcclLibrary, list[tuple[str, bool]], dict[str, list[int]]]


@pytest.mark.parametrize("send", [True, False])
def test_an_exchange_is_one_group_that_gives_the_interpreter_up_once(nccl: Nccl, send: bool) -> None:
    library, calls, statuses = nccl
    pair = library.communicator(0, bytes(nccl_library.ID_BYTES), 0)
    calls.clear()
    statuses["ncclGroupEnd"] = [IN_PROGRESS]
    pair.exchange([(1 << 40, 64), (1 << 41, 64), (1 << 42, 64)], 5, send=send)
    one = "ncclSend" if send else "ncclRecv"
    assert calls == [("ncclGroupStart", True), *[(one, True)] * 3, ("ncclGroupEnd", False)]


def test_a_group_is_ended_even_when_one_of_its_sends_is_refused(nccl: Nccl) -> None:
    """Else whatever this thread asks of NCCL next would belong to it."""
    library, calls, statuses = nccl
    pair = library.communicator(0, bytes(nccl_library.ID_BYTES), 0)
    statuses["ncclSend"] = [0, SYSTEM_ERROR, 0]
    with pytest.raises(LinkLost, match="ncclSend: pretended"):
        pair.exchange([(1 << 40, 64)] * 3, 5, send=True)
    assert calls[-1] == ("ncclGroupEnd", False)


def test_a_communicator_is_made_without_waiting_and_aborted_once(nccl: Nccl) -> None:
    library, calls, statuses = nccl
    statuses["ncclCommInitRankConfig"] = [IN_PROGRESS]
    pair = library.communicator(0, bytes(nccl_library.ID_BYTES), 1)
    pair.abort()
    pair.abort()
    assert calls == [("ncclCommInitRankConfig", False), ("ncclCommAbort", False)]
    statuses["ncclCommInitRankConfig"] = [SYSTEM_ERROR]
    with pytest.raises(LinkLost, match="ncclCommInitRankConfig"):
        library.communicator(0, bytes(nccl_library.ID_BYTES), 1)
    assert calls[-1] == ("ncclCommAbort", False), "what was made until then is given back"


def test_nothing_waits_for_the_whole_device() -> None:
    package = Path(cuda_runtime.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "cudaDeviceSynchronize" not in text
        assert "cuda.synchronize" not in text
        assert not re.search(r'"cudaMem(cpy|set)"', text), "the legacy stream waits for all others"
