"""What CUDA makes of a graph, pretended: the operations that were seen when it was recorded, on the tensors
they had then. No line of Python is run again; what would wait for the device is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.engine.devices.cuda.launch import Launch


class NotCapturable(RuntimeError):
    """What CUDA refuses while a graph is recorded."""


_recorders = threading.local()


class Recorder(TorchDispatchMode):
    _REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self._paused = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        _recorders.active = self
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "__call__", _launch)
            try:
                with self, _RefuseLooks():
                    yield
            finally:
                _recorders.active = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._paused:
            return result
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype is torch.bool for i in indices)
        if name in self._REFUSED or by_mask:
            raise NotCapturable(f"{name} waits for the device, or has a shape that depends on values")
        self.calls.append(_Recorded(func, args, kwargs, result))
        return result

    def kernel(self, call: Callable[[], None]) -> None:
        """What a device does by itself, reading its memory as it likes."""
        self._paused = True
        try:
            call()
        finally:
            self._paused = False
        self.calls.append(call)


class _Recorded:
    """Its results land where those of the recording are: whoever used them has their addresses."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        self._func, self._args, self._kwargs, self._result = func, args, kwargs, result
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs)) if one.numel()}
        self._made = [one.untyped_storage().data_ptr() not in given for one in _tensors(result)]

    def __call__(self) -> None:
        again = self._func(*self._args, **self._kwargs)
        for was, now, made in zip(_tensors(self._result), _tensors(again), self._made, strict=True):
            if made:
                was.copy_(now)


class _RefuseLooks(TorchFunctionMode):
    _LOOKS = frozenset(
        ["tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"]
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        recorder = getattr(_recorders, "active", None)
        name = getattr(func, "__name__", "")
        if name in self._LOOKS and recorder is not None and not recorder._paused:
            raise NotCapturable(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [one for part in value.values() for one in _tensors(part)]
    if isinstance(value, list | tuple):
        return [one for part in value for one in _tensors(part)]
    return []


_real_launch = Launch.__call__


def _launch(self: Launch, grid: tuple[int, ...], *arguments: Any) -> None:
    kernel(lambda: _real_launch(self, grid, *arguments))


def kernel(call: Callable[[], None]) -> None:
    """Compute `call`, which writes into tensors that are there, as one operation of the device: a graph has
    it as such."""
    recorder = getattr(_recorders, "active", None)
    if recorder is None:
        call()
    else:
        recorder.kernel(call)
