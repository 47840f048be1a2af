"""Scripts are declared once: what cannot work fails at import, what does not fit fails at the call."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from common.errors import ProtocolError
from common.store.keys import Key
from common.store.lua import Script

ONE = Key("pdq:one")


class Colour(enum.StrEnum):
    RED = "red"


class Sample(Script[list[tuple[Colour, int]]]):
    first: Key
    others: Sequence[Key]
    name: str
    count: int
    loud: bool
    wanted: int | None
    data: bytes
    numbers: Sequence[int]
    fields: Mapping[str, str | int]

    LUA = "return {first, others, name, count, loud, wanted, data, numbers, fields}"


class Flag(Script[bool]):
    lock: Key

    LUA = "return redis.call('EXISTS', lock)"


def a_sample(**changes: Any) -> Sample:
    values = {
        "first": ONE,
        "others": [Key("pdq:two")],
        "name": "n",
        "count": 1,
        "loud": True,
        "wanted": None,
        "data": b"\xff",
        "numbers": [2, 3],
        "fields": {"a": 1, "b": "x"},
    }
    return Sample(**(values | changes))


# ── Declaring ────────────────────────────────────────────────────────────────────────────────────


def a_number_of_an_argument() -> None:
    class Numbered(Script[int]):
        lock: Key
        LUA = "return redis.call('GET', lock .. ARGV[2])"


def an_unused_field() -> None:
    class Unused(Script[int]):
        lock: Key
        name: str
        LUA = "return redis.call('GET', lock) -- name"


def a_field_declared_again() -> None:
    class Again(Script[int]):
        lock: Key
        name: str
        LUA = "local holder, name = 1, 2; return redis.call('GET', lock .. name)"


def a_field_named_as_a_shared_function() -> None:
    class Shared(Script[int], library="local function get(record) return record end\n"):
        get: Key
        LUA = "return get"


def a_field_named_as_a_word_of_lua() -> None:
    class Word(Script[int]):
        end: Key
        LUA = "return end"


def a_field_named_as_an_attribute_of_every_script() -> None:
    class Named(Script[int]):
        digest: str  # type: ignore[misc]
        LUA = "return digest"


def a_field_of_another_type() -> None:
    class Other(Script[int]):
        lock: Key
        when: float
        LUA = "return when .. lock"


def a_list_of_either() -> None:
    class Either(Script[int]):
        items: Sequence[str | int]
        LUA = "return items"


def a_result_of_another_type() -> None:
    class Other(Script[dict[str, str]]):
        lock: Key
        LUA = "return redis.call('HGETALL', lock)"


@pytest.mark.parametrize(
    "declare",
    [
        a_number_of_an_argument,
        an_unused_field,
        a_field_declared_again,
        a_field_named_as_a_shared_function,
        a_field_named_as_a_word_of_lua,
        a_field_named_as_an_attribute_of_every_script,
        a_field_of_another_type,
        a_list_of_either,
        a_result_of_another_type,
    ],
)
def test_a_declaration_that_cannot_work_fails_at_import(declare: Callable[[], None]) -> None:
    with pytest.raises(TypeError):
        declare()


# ── Calling ──────────────────────────────────────────────────────────────────────────────────────


def test_keys_alone_go_through_keys_and_the_lengths_of_lists_before_the_lists() -> None:
    keys, arguments = a_sample().encoded()
    assert keys == [ONE, "pdq:two"]
    assert arguments == ["n", "1", "1", "", b"\xff", "1", "2", "4", "2", "3", "a", "1", "b", "x"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 1},
        {"name": None},
        {"count": "1"},
        {"count": True},
        {"count": 1.0},
        {"count": 2**53 + 1},
        {"loud": 1},
        {"wanted": "1"},
        {"data": "text"},
        {"numbers": "12"},
        {"numbers": ["1"]},
        {"others": "pdq:two"},
        {"fields": {"a": None}},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_before_it_is_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong))):
        a_sample(**wrong).encoded()


def test_a_call_without_one_of_its_fields_is_refused() -> None:
    with pytest.raises(TypeError, match="lock"):
        Flag()  # type: ignore[call-arg]


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_has_the_declared_type() -> None:
    assert a_sample().result([[b"red", 3], [b"red", 4]]) == [(Colour.RED, 3), (Colour.RED, 4)]
    assert a_sample().result([]) == []
    assert [Flag(lock=ONE).result(reply) for reply in (1, 0, None)] == [True, False, False]


@pytest.mark.parametrize("reply", [[[b"blue", 3]], [[b"red"]], [[b"red", b"3"]], [3], b"red", None])
def test_an_answer_of_another_type_is_an_error_that_names_the_script(reply: object) -> None:
    with pytest.raises(ProtocolError, match="Sample"):
        a_sample().result(reply)


@pytest.mark.parametrize("reply", [2, b"1", [1]])
def test_a_flag_is_one_or_zero(reply: object) -> None:
    with pytest.raises(ProtocolError, match="Flag"):
        Flag(lock=ONE).result(reply)
