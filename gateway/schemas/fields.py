"""What all bodies and the objects inside them have in common.

Owns: null as "not given", the three kinds of fields that a class does not declare (those that
change nothing, those that are not built yet, those that nobody knows), and one error for the first
thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from common.errors import InvalidRequest

ABSENT = "absent"

V = TypeVar("V")
Object = TypeVar("Object", bound="Fields")


class Fields(BaseModel):
    """An object of the API. A null is left out before any field is looked at."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    no_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields that are taken with any value: they are about an account, a bill or a hint, and the
    answer is right without them."""

    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that we know and refuse, each with the values that ask for nothing. Null and what is
    empty ask for nothing either, unless `asks_even_empty` names the field."""

    asks_even_empty: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


def parse(kind: type[Object], data: bytes) -> Object:
    """The body in `data`; raises `InvalidRequest` naming the first field that is wrong."""
    try:
        body = kind.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise _as_invalid(error.errors(include_url=False)[0]) from error
    for where, name, value, fields in _undeclared(body):
        if name in fields.not_built and _asks(value, name, fields):
            raise InvalidRequest(f"{where} is not supported yet", param=where)
    return body


def unknown_fields(body: Fields) -> Iterator[str]:
    """The path of each field that nobody knows, such as `messages.0.mood`."""
    for where, name, _, fields in _undeclared(body):
        if name not in fields.no_effect and name not in fields.not_built:
            yield where


def absent(field: str) -> PydanticCustomError:
    """What a validator of a whole object raises for a field that has to be there in this case."""
    return PydanticCustomError(ABSENT, "{field} is missing", {"field": field})


def given(value: V | None, default: V) -> V:
    return default if value is None else value


def _undeclared(fields: Fields, path: str = "") -> Iterator[tuple[str, str, Any, type[Fields]]]:
    """Path, name, value and class of every field that its class does not declare."""
    for name, value in (fields.model_extra or {}).items():
        yield path + name, name, value, type(fields)
    for name in type(fields).model_fields:
        value = getattr(fields, name)
        if isinstance(value, Fields):
            yield from _undeclared(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Fields):
            for index, item in enumerate(value):
                yield from _undeclared(item, f"{path}{name}.{index}.")


def _asks(value: object, name: str, fields: type[Fields]) -> bool:
    """Whether this value of a field that is not built asks for anything."""
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    if value in ("", [], {}):
        return name in fields.asks_even_empty
    return value not in fields.not_built[name]


def _as_invalid(error: Any) -> InvalidRequest:
    if error["type"] == "json_invalid":
        hint = " (half of a surrogate pair is no character)" if "hex escape" in error["msg"] else ""
        return InvalidRequest(f"the body is not JSON: {error['msg']}{hint}")
    # The location of a union has the name of the alternative that was tried: no identifier.
    parts = [part for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    if error["type"] == ABSENT:
        parts.append(error["ctx"]["field"])
    where = ".".join(map(str, parts)) or "body"
    if error["type"] in ("missing", ABSENT):
        return InvalidRequest(f"{where} is missing", param=where)
    return InvalidRequest(f"{where}: {error['msg']}", param=where)
