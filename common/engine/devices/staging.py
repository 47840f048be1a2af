"""How stored tensors come into a device's own memory: through a ring of buffers that its copies read late.

Owns the ring, and which of its memory may be written again. Host memory is bounded, whatever the size of a
model: a slot is filled anew only after the copies out of it have ended; while they run, the next one is
filled. Types are converted, and numbers looked at, on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from types import TracebackType

import torch
from torch import Tensor

from common.engine.devices.filling import Readers, Stored, as_bytes, pieces, why_not_finite
from common.engine.devices.queue import DeviceQueue, Event

SLOT_BYTES = 32 << 20
SLOTS = 3  # one is read into, one is copied from, one waits for its turn
ALIGNMENT = 256  # of what lies in a slot
FLAGS = 1024  # tensors in one array of flags


@dataclasses.dataclass(slots=True)
class _Slot:
    memory: Tensor
    copied: Event | None = None  # what was last read into it


class _Ring:
    """Host memory for what is on its way. One slot is open: tensors are packed into it, and when one does not
    fit, the next slot is opened, which waits for the copies out of that."""

    def __init__(self, queue: DeviceQueue, slots: int, slot_bytes: int) -> None:
        self._queue = queue
        self._slots = [_Slot(queue.pinned(slot_bytes)) for _ in range(slots)]
        self._open, self._used = 0, 0
        self.slot_bytes = slot_bytes

    def take(self, num_bytes: int) -> Tensor:
        """Memory that no copy reads; the caller's until it has been submitted, and then the copy's."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + num_bytes > self.slot_bytes:
            self._slots[self._open].copied = self._queue.record()
            self._open, start = (self._open + 1) % len(self._slots), 0
            copied = self._slots[self._open].copied
            if copied is not None:
                copied.wait()
        self._used = start + num_bytes
        return self._slots[self._open].memory[start : self._used]


class StagedFiller:
    """Implements `Filler` for memory of a device."""

    def __init__(
        self,
        queue: DeviceQueue,
        device: torch.device,
        readers: int,
        *,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        """`device` is the one whose queue it is."""
        self._queue, self._device = queue, device
        self._readers = Readers(readers)
        self._ring = _Ring(queue, slots, slot_bytes)
        self._landing: Tensor | None = None  # on the device: of tensors that are converted there
        self._flags: list[Tensor] = []  # bool [FLAGS] each: whose numbers are not finite
        self._filled: list[tuple[Stored, torch.dtype]] = []  # by flag

    def fill(self, place: Tensor, stored: Stored) -> None:
        flag, size = self._flag(place, stored), stored.dtype.itemsize
        for start, part in pieces(place, self._ring.slot_bytes // size):
            taken = self._ring.take(part.numel() * size)
            self._readers.read(stored, start * size, as_bytes(taken))
            self._queue.run(functools.partial(self._land, taken.view(stored.dtype), part, flag))

    def _flag(self, place: Tensor, stored: Stored) -> Tensor:
        number = len(self._filled)
        if number % FLAGS == 0:
            self._flags.append(torch.zeros(FLAGS, dtype=torch.bool, device=self._device))
        self._filled.append((stored, place.dtype))
        return self._flags[-1][number % FLAGS]

    def _land(self, taken: Tensor, part: Tensor, flag: Tensor) -> None:
        """On the device. A copy of torch that converts as well, or scatters, would do so on the host."""
        if taken.dtype == part.dtype and part.is_contiguous():
            part.view(-1).copy_(taken, non_blocking=True)
        else:
            if self._landing is None:
                self._landing = torch.empty(self._ring.slot_bytes, dtype=torch.uint8, device=self._device)
            landed = self._landing[: taken.nbytes].view(taken.dtype)
            landed.copy_(taken, non_blocking=True)
            part.copy_(landed.view(part.shape))
        low, high = torch.aminmax(part)  # NaN where there is any
        flag.logical_or_((low.isfinite() & high.isfinite()).logical_not_())

    def finish(self) -> None:
        self._queue.record().wait()
        for block, flags in enumerate(self._flags):
            for number in flags.nonzero().flatten().tolist():
                raise why_not_finite(*self._filled[block * FLAGS + number])

    def __enter__(self) -> StagedFiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The ring may go when nobody writes or copies any more."""
        self._readers.close()
        self._queue.record().wait()
