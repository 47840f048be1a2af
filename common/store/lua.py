"""Typed Lua: a script is a class, and its fields are what it is called with.

    class Unlock(Script[bool]):
        '''Gives the lock up; whether it was ours.'''

        lock: Key
        name: str

        LUA = '''
    if redis.call('GET', lock) ~= name then return false end
    return redis.call('DEL', lock)
    '''

    await client.call(Unlock(lock=keys.reaper_lock(), name="reaper-1"))  # bool

Owns: how fields become KEYS and ARGV, how a prelude binds these to locals of the same names, and how
a reply becomes the declared result. Knows no script, and nothing of connections (client.py).

    field                            in Lua
    Key, Sequence[Key]               string, list of strings; they alone go through KEYS
    str, bytes                       string
    int, int | None                  number, number or nil
    bool                             boolean
    Sequence[…] of these             list
    Mapping[str, …] of these         flat list of names and values, as `unpack` takes them, all strings

    result                           reply
    int, str                         integer, string
    bool                             1 is true; 0 and nil (Lua's false) are not
    StrEnum                          string, one of its values
    list[…], tuple[…, …]             list, list of exactly that many

A declaration that cannot work raises `TypeError` at import: a field of another type, one that the Lua
text does not use or declares again, KEYS or ARGV by number. So does a call with a value of another
type. A reply that is not of the declared type raises `ProtocolError`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import hashlib
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar, dataclass_transform

from common.errors import ProtocolError
from common.store.keys import Key

Result = TypeVar("Result")

_LARGEST = 2**53  # up to which Lua's numbers, which are doubles, tell integers apart
_RESERVED = frozenset(
    re.findall(
        r"\w+",
        "and break do else elseif end false for function goto if in local nil not or redis repeat "
        "return then true until while",
    )
)
_COMMENT = re.compile(r"--.*")
_LOCALS = re.compile(r"\blocal\s+(?:function\s+)?(\w+(?:\s*,\s*\w+)*)")
_TAKE = """
  local function _take(from, first, count)
    local items = {}
    for i = first, first + count - 1 do items[#items + 1] = from[i] end
    return items, first + count
  end
"""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Script(Generic[Result]):
    """A call of a script; each subclass declares one. `library` is Lua text of functions that scripts
    share: it goes before the fields, and sees none of them."""

    LUA: ClassVar[str]
    text: ClassVar[str]  # all of it: library, prelude, LUA
    digest: ClassVar[str]
    _fields: ClassVar[tuple[_Field, ...]]
    _result: ClassVar[Any]

    def __init_subclass__(cls, *, library: str = "") -> None:
        hints = typing.get_type_hints(cls)
        fields = [_field(cls.__name__, name, hints[name]) for name in cls.__annotations__]
        fields.sort(key=lambda field: field.is_many)
        cls._fields = tuple(fields)
        (result,) = typing.get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]
        cls._result = _check_result(result)
        _check_text(cls, library)
        cls.text = library + _prelude(cls._fields) + cls.LUA
        cls.digest = hashlib.sha1(cls.text.encode(), usedforsecurity=False).hexdigest()
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def encoded(self) -> tuple[list[str | bytes], list[str | bytes]]:
        """KEYS and ARGV: single values, then the lengths of all lists (in ARGV), then the lists."""
        keys: list[str | bytes] = []
        arguments: list[str | bytes] = []
        lists: list[str | bytes] = []
        for field in self._fields:
            values = field.encoded(getattr(self, field.name))
            if field.is_many:
                arguments.append(str(len(values)))
            if field.is_key:
                keys += values
            elif field.is_many:
                lists += values
            else:
                arguments += values
        return keys, arguments + lists

    def result(self, reply: object) -> Result:
        """The reply as what the script declares to answer."""
        try:
            found: Result = _read(self._result, reply)
        except (TypeError, ValueError) as error:
            name = type(self).__name__
            raise ProtocolError(f"the script {name} answered {reply!r:.200}: {error}") from error
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """One field: where it goes, and what may be in it."""

    name: str
    is_key: bool
    is_many: bool
    is_mapping: bool
    kinds: tuple[type, ...]

    def encoded(self, value: Any) -> list[str | bytes]:
        if not self.is_many:
            return [self._one(value)]
        if self.is_mapping:
            return [part for name, item in value.items() for part in (name, self._one(item))]
        if isinstance(value, (str, bytes)):
            raise TypeError(f"{self.name} is a list, unlike {value!r:.100}")
        return [self._one(item) for item in value]

    def _one(self, value: object) -> str | bytes:
        kind = str if isinstance(value, str) else type(value)
        if kind not in self.kinds:
            raise TypeError(f"{self.name} is of another type than {value!r:.100}")
        if isinstance(value, (str, bytes)):
            return value
        if isinstance(value, bool):
            return "1" if value else "0"
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise TypeError(f"{self.name}: Lua has no number {value}")
        return "" if value is None else str(value)

    def decoded(self, text: str) -> str:
        """The Lua expression for what `text`, a Lua expression of a string, stands for."""
        if self.is_mapping or self.kinds[0] in (str, bytes):
            return text
        return f"{text} == '1'" if self.kinds == (bool,) else f"tonumber({text})"


_SINGLE = ((str,), (bytes,), (int,), (bool,), (int, types.NoneType))
_MAPPED = {str, bytes, int}


def _field(script: str, name: str, hint: Any) -> _Field:
    is_mapping = typing.get_origin(hint) is collections.abc.Mapping
    is_many = is_mapping or typing.get_origin(hint) is collections.abc.Sequence
    item = typing.get_args(hint)[-1] if is_many else hint
    if item is Key and not is_mapping:
        return _Field(name, True, is_many, False, (str,))
    kinds = typing.get_args(item) or (item,)
    if not (set(kinds) <= _MAPPED if is_mapping else kinds in _SINGLE):
        raise TypeError(f"{script}.{name}: nothing of type {hint} can be given to a script")
    return _Field(name, False, is_many, is_mapping, kinds)


def _check_text(script: type[Script[Any]], library: str) -> None:
    library, body = _COMMENT.sub("", library), _COMMENT.sub("", script.LUA)
    if re.search(r"\b(KEYS|ARGV)\b", library + body):
        raise TypeError(f"{script.__name__}: KEYS and ARGV are for the prelude; name a field")
    shared = "\n".join(line for line in library.splitlines() if line.startswith("local"))
    taken = {
        name.strip() for names in _LOCALS.findall(f"{shared}\n{body}") for name in names.split(",")
    } | _RESERVED
    for field in script._fields:
        if field.name in taken or field.name.startswith("_"):
            raise TypeError(f"{script.__name__}.{field.name}: the Lua text has this name already")
        if hasattr(Script, field.name) or field.name in Script.__annotations__:
            raise TypeError(f"{script.__name__}.{field.name}: every script has this name already")
        if not re.search(rf"\b{field.name}\b", body):
            raise TypeError(f"{script.__name__}.{field.name}: the Lua text does not use it")


def _prelude(fields: Sequence[_Field]) -> str:
    """Lua that binds what each field holds to a local of its name; counts as `encoded` does."""
    lines: list[str] = []
    lists: list[str] = []
    last = {"KEYS": 0, "ARGV": 0}
    for field in fields:
        source = "KEYS" if field.is_key else "ARGV"
        if not field.is_many:
            last[source] += 1
            lines.append(f"local {field.name} = {field.decoded(f'{source}[{last[source]}]')}")
            continue
        last["ARGV"] += 1
        lines.append(f"local {field.name}")
        lists.append(
            f"  {field.name}, _{source} = _take({source}, _{source}, tonumber(ARGV[{last['ARGV']}]))"
        )
        if (item := field.decoded("item")) != "item":
            lists.append(f"  for i, item in ipairs({field.name}) do {field.name}[i] = {item} end")
    if lists:
        first = f"  local _KEYS, _ARGV = {last['KEYS'] + 1}, {last['ARGV'] + 1}"
        lines += ["do", _TAKE, first, *lists, "end"]
    return "\n".join(["", *lines, ""])


def _check_result(kind: Any) -> Any:
    """`kind` itself; `TypeError` if `_read` does not know it."""
    if typing.get_origin(kind) in (list, tuple):
        for item in typing.get_args(kind):
            _check_result(item)
    elif kind not in (int, str, bool) and not issubclass(kind, enum.StrEnum):
        raise TypeError(f"no script answers {kind}")
    return kind


def _read(kind: Any, reply: Any) -> Any:
    """`reply` as a `kind`; `TypeError` or `ValueError` if it is none."""
    if typing.get_origin(kind) in (list, tuple):
        if not isinstance(reply, list):
            raise TypeError("no list")
        items = typing.get_args(kind)
        if typing.get_origin(kind) is list:
            items *= len(reply)
        return typing.get_origin(kind)(_read(item, part) for item, part in zip(items, reply, strict=True))
    if kind is bool and reply in (None, 0, 1):
        return reply == 1
    if kind is int and isinstance(reply, int):
        return reply
    if isinstance(reply, bytes):
        text = reply.decode("utf-8", "replace")
        if kind is str:
            return text
        if issubclass(kind, enum.StrEnum):
            return kind(text)
    raise TypeError(f"no {kind.__name__}")
