"""The codec: every message survives the way, and no input whatever does harm."""

from __future__ import annotations

import dataclasses
import math
import struct
import tracemalloc
import types
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import MalformedMessage
from common.request import Request
from common.sampling import SamplingParams
from common.wire.codec import VERSION, decode, encode
from common.wire.message import Message, message
from common.wire.messages import MESSAGES, Dispatch
from tests.support.redis import a_dispatch

PROBABILITY = st.floats(0.125, 1.0, width=32)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(5, 2**40),
    min_tokens=st.integers(0, 5),
    temperature=st.floats(0.0, 100.0),
    top_k=st.integers(0, 2**31 - 1),
    top_p=PROBABILITY,
    min_p=PROBABILITY,
    repetition_penalty=PROBABILITY,
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    logit_bias=st.lists(st.tuples(st.integers(0, 2**31), st.floats(-100, 100)), max_size=3).map(tuple),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31), min_size=1, max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    seed=st.integers(0, 2**64 - 1),
)


def of_type(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type may have on the wire."""
    if annotation is SamplingParams:
        return PARAMS
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        fields = dataclasses.fields(annotation)
        return st.builds(annotation, **{f.name: of_type(hints[f.name]) for f in fields})
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return st.none() | of_type(inner)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(of_type(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of_type, arguments))
    if origin is dict:
        return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=3)
    return {
        int: st.integers(-(2**63), 2**64 - 1),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
    }[annotation]


MESSAGE = st.sampled_from(sorted(MESSAGES.values(), key=lambda m: m.kind)).flatmap(of_type)
ANY_VALUE: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def decodes_or_is_refused(data: bytes) -> None:
    try:
        message = decode(data)
    except MalformedMessage:
        return
    assert isinstance(message, Message)


@pytest.mark.parametrize("message_type", MESSAGES.values(), ids=lambda m: m.__name__)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_message_survives_the_way(message_type: type[Message], data: st.DataObject) -> None:
    message = data.draw(of_type(message_type))
    assert decode(encode(message)) == message
    assert decode(memoryview(bytearray(encode(message)))) == message


@given(st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    decodes_or_is_refused(data)
    decodes_or_is_refused(bytes([VERSION]) + data)


@given(kind=st.sampled_from(sorted(MESSAGES)), values=st.lists(ANY_VALUE, max_size=16))
@settings(max_examples=300, deadline=None)
def test_arbitrary_values_in_the_fields_are_refused(kind: int, values: list[Any]) -> None:
    decodes_or_is_refused(bytes([VERSION]) + msgpack.packb([kind, *values]))


@given(message=MESSAGE, data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_message_is_refused_or_is_another_valid_one(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    at = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    byte = data.draw(st.integers(0, 255))
    damaged = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes([byte]) + whole[at + 1 :],
        "insert": whole[:at] + bytes([byte]) + whole[at:],
        "repeat": whole + whole[at:],
    }[damage]
    decodes_or_is_refused(damaged)


@given(message=MESSAGE, surplus=st.binary(min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_trailing_bytes_and_missing_ones_are_refused(message: Message, surplus: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(encode(message) + surplus)
    with pytest.raises(MalformedMessage):
        decode(encode(message)[:-1])


@pytest.mark.parametrize("message_type", MESSAGES.values(), ids=lambda m: m.__name__)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_surplus_a_missing_and_a_mistyped_field_are_refused(
    message_type: type[Message], data: st.DataObject
) -> None:
    values = msgpack.unpackb(encode(data.draw(of_type(message_type)))[1:], strict_map_key=False)
    at = data.draw(st.integers(1, len(values) - 1))
    for wrong in (
        [*values, 0],
        values[:-1],
        [*values[:at], msgpack.Timestamp(1), *values[at + 1 :]],
        [*values[:at], {1: 2}, *values[at + 1 :]],
    ):
        with pytest.raises(MalformedMessage):
            decode(bytes([VERSION]) + msgpack.packb(wrong))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x90",  # an empty list
        b"\x91\xcd\xff\xff",  # an unknown kind
        b"\x91\xc3",  # true is no kind
        b"\x81\x01\x02",  # a map
        b"\xdd\xff\xff\xff\xff",  # a list that claims four milliards of entries
        b"\xc6\xff\xff\xff\xff",  # bytes that claim to be four gigabytes
        b"\x91" * 5000,  # nested deeper than any stack
        b"\x91\xa1\xff",  # text that is not UTF-8
    ],
)
def test_known_traps_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(bytes([VERSION]) + body)


@pytest.mark.parametrize(
    "header",
    [
        b"\xdc\x27\x10",  # a list of ten thousand
        b"\xdd\x00\x00\x27\x10",
        b"\xde\x27\x10",  # a map
        b"\xdf\x00\x00\x27\x10\xa0",
        b"\x9f",
        b"\x8f\xa0",
        b"\x91",
        b"\xc6\x00\x01\x86\xa0",  # bytes
        b"\xdb\x00\x01\x86\xa0",  # text
    ],
)
@pytest.mark.parametrize("depth", [1, 100, 511, 1023, 5000])
@pytest.mark.parametrize("rest", [0, 90_000])
def test_what_is_only_claimed_takes_no_memory(header: bytes, depth: int, rest: int) -> None:
    """Lists in lists that promise entries that do not come: a message of 100 KB took 42 MB."""
    data = bytes([VERSION]) + header * depth + b"\x01" * rest
    assert peak_of_decoding(data) <= 100 * len(data) + 2**16


@given(
    length=st.integers(0, 2**32 - 1),
    depth=st.integers(0, 1100),
    header=st.sampled_from([0xDC, 0xDD, 0xDE, 0xDF, 0xC4, 0xC6, 0xDB, 0xC9]),
    before=st.binary(max_size=20),
    rest=st.binary(max_size=2000),
    copies=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_no_length_that_is_claimed_takes_more_than_the_input_holds(
    length: int, depth: int, header: int, before: bytes, rest: bytes, copies: int
) -> None:
    width = {0xDC: ">H", 0xDE: ">H", 0xC4: ">B"}.get(header, ">I")
    claim = bytes([header]) + struct.pack(width, length & (2 ** (8 * struct.calcsize(width)) - 1))
    data = bytes([VERSION]) + before + claim * depth + rest * copies
    assert peak_of_decoding(data) <= 100 * len(data) + 2**16


def peak_of_decoding(data: bytes) -> int:
    """Bytes that decoding needs at most at once. A list, the costliest of what one byte can stand
    for, takes 72, and its entry in the list that it is in 8 more."""
    tracemalloc.start()
    try:
        decodes_or_is_refused(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(MalformedMessage, match=f"version 9, this is version {VERSION}"):
        decode(b"\x09\x90")


def test_no_two_messages_have_one_number() -> None:
    class Another(Message):
        """Of nobody."""

    with pytest.raises(AssertionError, match="50 is taken"):
        message(50)(Another)


def test_values_that_sampling_forbids_are_malformed_not_a_crash() -> None:
    values = msgpack.unpackb(encode(a_dispatch())[1:])
    kinds_and_names = ((Dispatch, "request"), (Request, "params"), (SamplingParams, "temperature"))
    request, params, temperature = (
        [field.name for field in dataclasses.fields(kind)].index(name) for kind, name in kinds_and_names
    )
    values[1 + request][params][temperature] = math.nan
    with pytest.raises(MalformedMessage, match="temperature"):
        decode(bytes([VERSION]) + msgpack.packb(values))


@pytest.mark.parametrize("wrong", [{"cache_salt": "\ud800"}, {"priority": 2**64}])
def test_what_cannot_be_sent_is_a_typed_error_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="cannot be sent"):
        encode(a_dispatch(**wrong))
