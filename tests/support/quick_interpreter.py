"""Triton's interpreter without what it repeats for every call of one kernel function by another.

It looks through all names of triton's language each time: a third of the time that a kernel of many small
functions takes. What is computed is the same. And in triton 3.6 a number that a kernel has loaded, an array
of one element, is no bound of a loop for a NumPy of today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None: ...


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patch_tensor = interpreter._patch_lang_tensor
    patched: set[Callable[..., Any]] = set()  # functions, in the launch that is under way

    def patch_once(function: Callable[..., Any]) -> Any:
        if function in patched:
            return _NothingToRestore()
        patched.add(function)
        return patch(function)

    def launch_anew(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        launch(self, *arguments, **named)

    def patch_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
