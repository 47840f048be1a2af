"""The bytes between the gateway and its intake processes: a length, a JSON head, then plain bytes.

Owns: both directions' form. A frame begins with the lengths of head and rest and whether it is the
last of its sender; token ids travel as 32-bit integers of this machine. Nothing in it is executable,
whatever a process that was taken over by a hostile body may send.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from array import array
from typing import Any

from common.errors import PdqError, ProtocolError
from gateway.errors import error_named
from gateway.intake.prepare import Prepared, Question

LENGTHS = struct.Struct("!II?")
MAX_HEAD_BYTES, MAX_REST_BYTES = 2**20, 2**28
ID_BYTES = array("I").itemsize


Parts = list["bytes | memoryview"]


def frame(head: object, *rest: bytes | memoryview, last: bool = False) -> Parts:
    data = json.dumps(head).encode()
    return [LENGTHS.pack(len(data), sum(len(part) for part in rest), last), data, *rest]


def lengths(data: bytes) -> tuple[int, int, bool]:
    """Bytes of head and rest that follow, and whether nothing comes after them; raises
    `ProtocolError` beyond what we ever send."""
    head, rest, last = LENGTHS.unpack(data)
    if head > MAX_HEAD_BYTES or rest > MAX_REST_BYTES:
        raise ProtocolError(f"a frame of {head} and {rest} bytes")
    return head, rest, last


def hello_frame(pid: int) -> Parts:
    return frame({"pid": pid})


def pid_in(head: bytes) -> int:
    return int(json.loads(head)["pid"])


def question_frame(question: Question, body: bytes) -> Parts:
    return frame(dataclasses.asdict(question), body)


def question_in(head: bytes) -> Question:
    return Question(**json.loads(head))


def prepared_frame(prepared: Prepared, *, last: bool = False) -> Parts:
    texts = (*prepared.prompts, prepared.prediction)
    ids = [ids if isinstance(ids, array) else array("I", ids) for ids in texts]
    head = {
        "unknown": prepared.unknown,
        "fields": len(prepared.fields),
        "texts": [len(each) for each in ids],
        "echoes": [len(echo) for echo in prepared.echoes],
    }
    views = [memoryview(each).cast("B") for each in ids if each]
    return frame(head, prepared.fields, *views, *prepared.echoes, prepared.answer, last=last)


def error_frame(error: PdqError, *, last: bool = False) -> Parts:
    return frame({"error": [error.code, error.message, error.param]}, last=last)


def prepared_in(head: bytes, rest: bytes) -> Prepared:
    """The answer in a frame; raises the error that it carries, `ProtocolError` if it is none."""
    try:
        known: dict[str, Any] = json.loads(head)
        if "error" in known:
            code, message, param = known["error"]
            raise error_named(code, message, param)
        at = known["fields"]
        fields = rest[:at]
        texts, echoes = [], []
        for count in known["texts"]:
            ids = array("I")
            ids.frombytes(rest[at : at + count * ID_BYTES])
            at += count * ID_BYTES
            texts.append(ids)
        for length in known["echoes"]:
            echoes.append(rest[at : at + length])
            at += length
        unknown = tuple(map(str, known["unknown"]))
        *prompts, prediction = texts
        return Prepared(fields, tuple(prompts), prediction or (), tuple(echoes), unknown, rest[at:])
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"not an answer of an intake process: {error}") from error
