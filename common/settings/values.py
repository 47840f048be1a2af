"""How the value of a setting is written, by its type: text into a value, and back.

Types are `str`, `int`, `float`, `bool`, a `Literal`, a tuple of one of these, and each of them or None.
"none" stands for no value. A tuple is written with commas.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?", re.ASCII)
DEVICE_FORM = "auto|cpu|cuda|cuda:N"
BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def parse_bytes(text: str) -> int:
    """`512`, `512k`, `1.5GiB`, `2g` as a number of bytes; `ValueError` for anything else."""
    lowered = text.strip().lower().removesuffix("b")
    number = lowered.rstrip("kmgi")
    size = float(number) * BYTE_UNITS[lowered[len(number) :]] if number else math.nan
    if not math.isfinite(size):
        raise ValueError(text)
    return int(size)


def parse_device(text: str) -> str:
    """`auto`, `cpu`, `cuda`, or `cuda:` and the index of a GPU among those that the process sees;
    `ValueError` for anything else."""
    if not DEVICE.fullmatch(text):
        raise ValueError(text)
    return text


def optional(annotation: Any) -> Any | None:
    """X of `X | None`, or None."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (inner,) = (a for a in typing.get_args(annotation) if a is not type(None))
        return inner
    return None


def parse(text: str, annotation: Any, parse_item: Callable[[str], Any] | None = None) -> Any:
    """The value that `text` spells; `ValueError` or `KeyError`. `parse_item` says how, or how each item of
    a tuple, where the type alone does not."""
    if (inner := optional(annotation)) is not None:
        return None if text.lower() == "none" else parse(text, inner, parse_item)
    if typing.get_origin(annotation) is tuple:
        if text.lower() == "none":
            return ()
        parts = _items(text)
        if not parts:  # an empty list is "none"
            raise ValueError(text)
        item = typing.get_args(annotation)[0]
        return tuple(parse(part, item, parse_item) for part in parts)
    if parse_item is not None:
        return parse_item(text)
    if annotation is bool:
        return BOOLEANS[text.lower()]
    if annotation is float:
        return check(float(text), float)
    if annotation is int:
        return int(text)
    return check(text, annotation)


def _items(text: str) -> list[str]:
    """What stands between commas; those inside a JSON object separate nothing."""
    items = []
    while text := text.lstrip(" ,"):
        end = text.find(",") if "," in text else len(text)
        if text.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                end = json.JSONDecoder().raw_decode(text)[1]
        items.append(text[:end].strip())
        text = text[end:]
    return [item for item in items if item]


def check(value: Any, annotation: Any) -> Any:
    """`value` if it is of the type, tuples made from lists and floats from ints; `ValueError`."""
    if (inner := optional(annotation)) is not None:
        return None if value in (None, "none") else check(value, inner)
    if typing.get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        return tuple(check(item, typing.get_args(annotation)[0]) for item in value)
    if typing.get_origin(annotation) is Literal and value in typing.get_args(annotation):
        return value
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if annotation in (str, int, bool) and type(value) is annotation:
        return value
    raise ValueError(value)


def in_words(annotation: Any) -> str:
    if (inner := optional(annotation)) is not None:
        return f"{in_words(inner)} or none"
    if typing.get_origin(annotation) is tuple:
        return f"a list, each {in_words(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names[annotation]


def metavar(annotation: Any) -> str:
    if (inner := optional(annotation)) is not None:
        return metavar(inner)
    if typing.get_origin(annotation) is tuple:
        return metavar(typing.get_args(annotation)[0]) + ",…"
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    return {int: "N", float: "X", str: "TEXT"}.get(annotation, "VALUE")


def text_of(value: Any) -> str:
    """The spelling that `parse` reads back."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
