"""Bytes of a message: a version byte, then msgpack of [kind, field values…], strictly checked.

Owns the mapping between the dataclasses of messages.py and bytes. Unknown version, unknown kind,
a missing or surplus field, a wrong type, or trailing bytes raise `MalformedMessage`, whatever the
input; nothing is allocated beyond what the input itself holds: msgpack makes room for as many
entries as a list claims to have, level below level, so that it is skipped through first, which
allocates nothing and fails where a claim is not followed by its bytes. The only user of msgpack.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]

from common.errors import InvalidRequest, MalformedMessage
from common.wire.message import Message
from common.wire.messages import MESSAGES

VERSION = 5
_PREFIX = bytes([VERSION])

_Check = Callable[[Any, str], Any]


def encode(message: Message) -> bytes:
    """One message as bytes; `MalformedMessage` for a value that has no bytes: an integer beyond 64
    bits, half of a surrogate pair."""
    kind = type(message).kind
    try:
        body: bytes = msgpack.packb([kind, *_fields_out(message)], use_bin_type=True)
    except (OverflowError, UnicodeEncodeError) as error:
        raise MalformedMessage(f"{type(message).__name__} cannot be sent: {error}") from error
    return _PREFIX + body


def decode(data: bytes | bytearray | memoryview) -> Message:
    """The message in `data`; raises `MalformedMessage` for anything that `encode` cannot have made."""
    view = memoryview(data)
    if len(view) < 2 or view[0] != VERSION:
        found = view[0] if len(view) else "nothing"
        raise MalformedMessage(
            f"message version {found}, this is version {VERSION}: the sender is another pdq"
        )
    body, limit = view[1:], len(view)
    try:
        claims = msgpack.Unpacker(max_buffer_size=limit)
        claims.feed(body)
        claims.skip()  # `OutOfData` unless every entry that is claimed is there
        value = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limit,
            max_map_len=limit,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"not a message: {error}") from error
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        raise MalformedMessage("a message is a list that starts with its kind")
    message_type = MESSAGES.get(value[0])
    if message_type is None:
        raise MalformedMessage(f"unknown message kind {value[0]}")
    message: Message = _checker(typing.cast(Any, message_type))(value[1:], message_type.__name__)
    return message


def _fields_out(value: Any) -> list[Any]:
    return [_out(getattr(value, name)) for name in _names(typing.cast(Any, type(value)))]


@functools.cache
def _names(message_type: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(message_type))


def _out(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _fields_out(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], (int, str, bytes, float)):
        return [_out(item) for item in value]
    return value


@functools.cache
def _checker(annotation: Any) -> _Check:
    """A function that turns a decoded msgpack value into `annotation`, or raises."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _dataclass_checker(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        check = _checker(inner)
        return lambda value, where: None if value is None else check(value, where)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _checker(arguments[0])
        if arguments[0] in (int, str, bytes):
            return functools.partial(_scalar_tuple, arguments[0])
        return lambda value, where: tuple(item(v, where) for v in _a_list(value, where, None))
    if origin is tuple:
        items = [_checker(a) for a in arguments]
        return lambda value, where: tuple(
            check(v, where) for check, v in zip(items, _a_list(value, where, len(items)), strict=True)
        )
    if origin is dict:
        key, item = (_checker(a) for a in arguments)
        return lambda value, where: {key(k, where): item(v, where) for k, v in _a_dict(value, where).items()}
    if annotation in (int, str, bytes, bool, float):
        return functools.partial(_scalar, annotation)
    raise TypeError(f"no wire form for {annotation!r}")


def _dataclass_checker(message_type: type[Any]) -> _Check:
    hints = typing.get_type_hints(message_type)
    fields = [
        (f".{f.name}", hints[f.name], _checker(hints[f.name])) for f in dataclasses.fields(message_type)
    ]

    def check(value: Any, where: str) -> Any:
        values = _a_list(value, where, len(fields))
        checked = [  # most are of a plain type, and right
            v if type(v) is hint else f(v, where + name)
            for (name, hint, f), v in zip(fields, values, strict=True)
        ]
        try:
            return message_type(*checked)
        except InvalidRequest as error:
            raise MalformedMessage(f"{where}: {error}", param=error.param) from error

    return check


def _scalar(wanted: type, value: Any, where: str) -> Any:
    if type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        return float(value)
    raise MalformedMessage(f"{where} must be {wanted.__name__}, not {type(value).__name__}")


def _scalar_tuple(wanted: type, value: Any, where: str) -> tuple[Any, ...]:
    values = _a_list(value, where, None)
    if set(map(type, values)) - {wanted}:
        raise MalformedMessage(f"{where} must hold {wanted.__name__} only")
    return tuple(values)


def _a_list(value: Any, where: str, length: int | None) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedMessage(f"{where} must be a list, not {type(value).__name__}")
    if length is not None and len(value) != length:
        raise MalformedMessage(f"{where} must have {length} entries, not {len(value)}")
    return value


def _a_dict(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise MalformedMessage(f"{where} must be a map, not {type(value).__name__}")
    return value
