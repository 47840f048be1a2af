"""An accelerator without one: its memory is the host's, and it computes as late, or in as odd an order, as
`DeviceQueue` allows.

Work waits in its queue until somebody waits for an event behind it (`LATE`), or is done in turns of a random
order that keeps each queue's own (`RANDOM`), or at once (`EARLY`). What a copy to the host has not brought
yet is garbage there. So what host logic gets wrong shows as a wrong result: a pinned buffer that is written
again too early, tokens that are read too early, blocks that somebody else fills while queued work still
writes.

A graph is what CUDA makes of it (recorded_calls.py).

`inject` makes an operation fail: when it is given, when it is computed (then the device is lost), or not at
all (it hangs until `release`).
"""

from __future__ import annotations

import enum
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.engine.devices.queue import Event, Graph, Work
from tests.support.recorded_calls import NotCapturable, Recorder

GARBAGE = 0xA5
LOST = "CUDA error: an illegal memory access was encountered (pretended)"


class Order(enum.Enum):
    EARLY = "early"
    LATE = "late"
    RANDOM = "random"


class Fault(enum.Enum):
    AT_ENQUEUE = "raises when it is given"
    AT_EVENT = "raises when it is waited for, and computes all the same"
    IN_WORK = "fails when it is computed: the device is lost"
    HANGS = "does not end"


class HostLooked(AssertionError):
    """The host read or computed device memory outside of queued work."""


class _Operation:
    def __init__(self, what: str, action: Work) -> None:
        self.what, self.action = what, action
        self.hangs = self.breaks = False


class FakeAccelerator:
    """Its queues compute in the threads of those who wait for them, one operation at a time."""

    def __init__(self, order: Order = Order.LATE, seed: int = 0) -> None:
        self.order = order
        self.changed = threading.Condition(threading.RLock())
        self.queues: list[FakeQueue] = []
        self.lost: RuntimeError | None = None
        self.peak_bytes = 1 << 20  # of whatever is measured
        self.given: list[str] = []  # kinds of all operations so far
        self.event_faults = 0  # of those to come, how many events raise
        self.memory: list[tuple[int, int]] = []  # device memory: [begin, end)
        self.kept: list[Tensor] = []  # so that nothing else gets those addresses
        self._random = random.Random(seed)
        self._injected: dict[tuple[str, int], Fault] = {}
        self._counts: dict[str, int] = {}
        self._released = False
        self.computing = threading.local()

    def queue(self) -> FakeQueue:
        self.queues.append(FakeQueue(self))
        return self.queues[-1]

    # Faults.

    def inject(self, what: str, nth: int, fault: Fault) -> None:
        """The `nth` operation of a kind from now on, counted from 0: run, copy, record, replay."""
        with self.changed:
            self._injected[what, self._counts.get(what, 0) + nth] = fault

    @property
    def injected(self) -> int:
        """Faults that have not come yet."""
        return len(self._injected)

    def release(self) -> None:
        """What hangs goes on."""
        with self.changed:
            self._released = True
            self.changed.notify_all()

    def refuse_capture(self, what: str) -> None:
        if getattr(self.computing, "captures", False):
            raise NotCapturable(f"{what} while a graph is recorded")

    # The device's side.

    def give(self, queue: FakeQueue, what: str, action: Work) -> None:
        with self.changed:
            self.check()
            number = self._counts[what] = self._counts.get(what, 0) + 1
            fault = self._injected.pop((what, number - 1), None)
            if fault is Fault.AT_ENQUEUE:
                raise RuntimeError(f"{what} {number - 1} could not be given")
            if fault is Fault.AT_EVENT:
                self.event_faults += 1
            operation = _Operation(what, action)
            operation.hangs = fault is Fault.HANGS
            operation.breaks = fault is Fault.IN_WORK
            self.given.append(what)
            queue.waiting.append(operation)
            self.changed.notify_all()
            self.turn()

    def check(self) -> None:
        if self.lost is not None:
            raise RuntimeError(LOST) from self.lost

    def turn(self) -> None:
        """What happens while the host does something else."""
        if self.order is Order.LATE:
            return
        while ready := self._ready():
            if self.order is Order.RANDOM and self._random.random() < 0.5:
                return
            self._compute(self._random.choice(ready))

    def _ready(self) -> list[FakeQueue]:
        return [queue for queue in self.queues if queue.can_go_on]

    def _compute(self, queue: FakeQueue) -> None:
        operation = queue.waiting[0]
        if operation.hangs and not self._released:
            queue.hangs = True
            return
        queue.hangs = False
        queue.waiting.popleft()
        if self.lost is not None:
            return  # nothing is computed any more
        try:
            if operation.breaks:
                raise RuntimeError("an injected fault")
            with self.as_device():
                operation.action()
        except Exception as error:
            self.lost = RuntimeError(repr(error))
            self.lost.__cause__ = error

    @contextmanager
    def as_device(self) -> Iterator[None]:
        """What is done here, by this thread, the device does."""
        before = getattr(self.computing, "is_device", False)
        self.computing.is_device = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self.computing.is_device = before

    def until(self, done: Callable[[], bool], queue: FakeQueue) -> None:
        """Compute until `done`; no more than that needs where work comes late."""
        with self.changed:
            while not done():
                if self._released:
                    for one in self.queues:
                        one.hangs = False
                if self.order is Order.LATE:
                    ready = [needed] if (needed := queue.needed()) is not None else []
                else:
                    ready = self._ready()
                if ready:
                    self._compute(self._random.choice(ready))
                elif queue.waiting or not done():
                    self.changed.wait(1.0)
            self.changed.notify_all()

    # The host's side.

    def owns(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        address = tensor.untyped_storage().data_ptr()
        return any(begin <= address < end for begin, end in self.memory)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """`HostLooked` where this thread computes with device memory, or looks into it, by itself."""
        with _Watch(self):
            yield


# Of a tensor, but not of what is in it.
_SAFE = frozenset(
    {"view", "as_strided", "reshape", "narrow", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"}
    | {"transpose", "detach", "size", "stride", "dim", "numel", "element_size", "is_contiguous", "__len__"}
    | {"storage_offset", "untyped_storage", "data_ptr", "__getitem__", "__get__", "__repr__", "__hash__"}
)


class _Watch(TorchFunctionMode):
    def __init__(self, accelerator: FakeAccelerator) -> None:
        super().__init__()
        self._accelerator = accelerator

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        accelerator = self._accelerator
        if not getattr(accelerator.computing, "is_device", False):
            name = getattr(func, "__name__", str(func))
            if name not in _SAFE and any(isinstance(a, Tensor) and accelerator.owns(a) for a in args):
                raise HostLooked(f"{name} of device memory by the host")
        return func(*args, **(kwargs or {}))


class FakeEvent:
    def __init__(self, queue: FakeQueue) -> None:
        self._queue, self.has_come = queue, False

    def is_done(self) -> bool:
        accelerator = self._queue.accelerator
        accelerator.refuse_capture("is_done")
        with accelerator.changed:
            accelerator.check()
            accelerator.turn()
            return self.has_come

    def wait(self) -> None:
        accelerator = self._queue.accelerator
        accelerator.refuse_capture("wait")
        accelerator.until(lambda: self.has_come or accelerator.lost is not None, self._queue)
        accelerator.check()
        with accelerator.changed:
            if accelerator.event_faults:
                accelerator.event_faults -= 1
                raise RuntimeError("an event could not be waited for")


class FakeGraph:
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self.calls = calls


class FakeQueue:
    """See `DeviceQueue`."""

    def __init__(self, accelerator: FakeAccelerator) -> None:
        self.accelerator = accelerator
        self.waiting: deque[_Operation] = deque()
        self.hangs = False  # at its first operation
        self.blocked_by: FakeEvent | None = None

    @property
    def can_go_on(self) -> bool:
        if self.hangs or not self.waiting:
            return False
        first = self.waiting[0]
        return not (isinstance(first, _Wait) and not first.event.has_come)

    def needed(self) -> FakeQueue | None:
        """The queue that has to go on for this one to go on."""
        if self.can_go_on:
            return self
        if not self.waiting or self.hangs:
            return None
        first = self.waiting[0]
        assert isinstance(first, _Wait)
        return first.event._queue.needed()

    def run(self, work: Work) -> None:
        self.accelerator.give(self, "run", work)

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, into: Tensor, source: Tensor) -> None:
        assert into.shape == source.shape
        assert into.is_contiguous()
        assert source.is_contiguous()
        accelerator = self.accelerator
        assert accelerator.owns(into) != accelerator.owns(source), "one of them is pinned memory"
        if accelerator.owns(source):
            with accelerator.changed, accelerator.as_device():
                into.fill_(GARBAGE)
        accelerator.give(self, "copy", lambda: _copy(into, source))

    def record(self) -> FakeEvent:
        event = FakeEvent(self)

        def come() -> None:
            event.has_come = True

        self.accelerator.give(self, "record", come)
        return event

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        with self.accelerator.changed:
            self.accelerator.check()
            self.waiting.append(_Wait(event))
            self.accelerator.turn()

    def capture(self, work: Work) -> FakeGraph:
        accelerator = self.accelerator
        with accelerator.changed:
            accelerator.check()
            recorder, before = Recorder(), [memory.clone() for memory in accelerator.kept]
            accelerator.computing.captures = True
            try:
                with accelerator.as_device(), recorder.recording():
                    work()
            finally:
                accelerator.computing.captures = False
                for memory, content in zip(accelerator.kept, before, strict=True):
                    memory.copy_(content)  # what is recorded is not computed
            return FakeGraph(recorder.calls)

    def replay(self, graph: Graph) -> None:
        assert isinstance(graph, FakeGraph)

        def again() -> None:
            for call in graph.calls:
                call()

        self.accelerator.give(self, "replay", again)

    def synchronize(self) -> None:
        accelerator = self.accelerator
        accelerator.refuse_capture("synchronize")
        accelerator.until(lambda: not self.waiting or accelerator.lost is not None, self)
        accelerator.check()

    def peak_of(self, give: Callable[[], object]) -> int:
        give()
        self.synchronize()
        return self.accelerator.peak_bytes

    def pinned(self, num_bytes: int) -> Tensor:
        self.accelerator.refuse_capture("pinned")
        return torch.full((num_bytes,), GARBAGE, dtype=torch.uint8)

    def zeros(self, num_bytes: int) -> Tensor:
        return self.own(torch.zeros(max(num_bytes, 1), dtype=torch.uint8))[:num_bytes]

    def own(self, tensor: Tensor) -> Tensor:
        """This memory counts as the device's from now on, for good."""
        begin = tensor.untyped_storage().data_ptr()
        self.accelerator.memory.append((begin, begin + tensor.untyped_storage().nbytes()))
        self.accelerator.kept.append(tensor)
        return tensor


class _Wait(_Operation):
    def __init__(self, event: FakeEvent) -> None:
        super().__init__("wait", lambda: None)
        self.event = event


def _copy(into: Tensor, source: Tensor) -> None:
    into.copy_(source)
