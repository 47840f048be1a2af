"""Copies of a model world, as bytes: thousands a second, each on its own.

A copy shares nothing with its original but what never changes: that is kept once, by number.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

VALUES: list[Any] = []  # by number, which processes may give differently
HASHES: list[int] = []  # of these values, by number: equal in all processes that were forked
_NUMBERS: dict[Any, int] = {}
_REDUCERS: dict[type, Callable[[Any], tuple[Any, tuple[int]]]] = copyreg.dispatch_table.copy()


def number_of(value: Any) -> int:
    """The number of a value that never changes: equal values have the same."""
    number = _NUMBERS.get(value)
    if number is None:
        number = _NUMBERS[value] = len(VALUES)
        VALUES.append(value)
        HASHES.append(hash(value))
    return number


def _value(number: int) -> Any:
    return VALUES[number]


def _by_number(value: Any) -> tuple[Any, tuple[int]]:
    return _value, (number_of(value),)


def keep_by_number(types: Iterable[type]) -> None:
    """Values of these types never change, or are one of a kind."""
    _REDUCERS.update(dict.fromkeys(types, _by_number))


def keep_by_code(made_of: Iterable[Any]) -> None:
    """Short codes for classes and functions of which every copy is made; they would be looked up by
    name each time."""
    for code, part in enumerate((_value, *made_of), start=200):
        copyreg.add_extension(part.__module__, part.__qualname__, code)


def save(world: Any) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(world)
    return file.getvalue()


def load(data: bytes) -> Any:
    return pickle.loads(data)
