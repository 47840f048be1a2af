"""The record of a request as a reader sees it. Its fields in Redis are listed in records.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from common.logs import get_logger
from common.store.client import text
from common.store.request_state import State

log = get_logger("requests")


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """One choice in its current attempt. `at` is unix ms by state, `seconds` durations by stage."""

    choice: int
    state: State
    attempt: int
    prefill_node: str
    decode_node: str
    generated: int
    cached_tokens: int
    finish_reason: str
    error: str
    message: str
    at: dict[str, int]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt: in whose stream it was put, and who won it."""

    attempt: int
    choices: tuple[int, ...]
    node: str
    claim: str


@dataclasses.dataclass(frozen=True, slots=True)
class RequestRecord:
    """All that Redis knows of a request; times are unix ms, 0 where something has not happened."""

    request: str
    state: State
    attempt: int
    gateway: str
    model: str
    prompt_len: int
    priority: int
    accepted_at: int
    ended_at: int
    choices: tuple[ChoiceRecord, ...]
    attempts: tuple[AttemptRecord, ...]


def record_of(request: str, reply: Mapping[bytes, bytes]) -> RequestRecord | None:
    """The record in a reply to HGETALL; None, and logged, if it is not one of this version."""
    fields = {text(name): text(value) for name, value in reply.items()}
    try:
        return _record(request, fields)
    except (ValueError, KeyError) as error:
        log.warning("requests.unreadable", request=request, error=repr(error))
        return None


def _record(request: str, fields: Mapping[str, str]) -> RequestRecord:
    attempts = sorted(int(name[1:-8]) for name in fields if name[:1] == "a" and name.endswith(".choices"))
    return RequestRecord(
        request=request,
        state=State(fields["state"]),
        attempt=int(fields["attempt"]),
        gateway=fields["gateway"],
        model=fields["model"],
        prompt_len=int(fields["prompt_len"]),
        priority=int(fields["priority"]),
        accepted_at=int(fields["accepted_at"]),
        ended_at=int(fields.get("ended_at", 0)),
        choices=tuple(_choice(int(choice), fields) for choice in fields["choices"].split(",")),
        attempts=tuple(
            AttemptRecord(
                attempt=attempt,
                choices=tuple(int(c) for c in fields[f"a{attempt}.choices"].split(",")),
                node=fields[f"a{attempt}.node"],
                claim=fields.get(f"a{attempt}.claim", ""),
            )
            for attempt in attempts
        ),
    )


def _choice(choice: int, fields: Mapping[str, str]) -> ChoiceRecord:
    prefix = f"c{choice}."
    mine = {name.removeprefix(prefix): v for name, v in fields.items() if name.startswith(prefix)}
    return ChoiceRecord(
        choice=choice,
        state=State(mine["state"]),
        attempt=int(mine["attempt"]),
        prefill_node=mine.get("prefill_node", ""),
        decode_node=mine.get("decode_node", ""),
        generated=int(mine.get("generated", 0)),
        cached_tokens=int(mine.get("cached_tokens", 0)),
        finish_reason=mine.get("finish_reason", ""),
        error=mine.get("error", ""),
        message=mine.get("message", ""),
        at={name[:-3]: int(value) for name, value in mine.items() if name.endswith("_at")},
        seconds={
            name.removeprefix("seconds."): float(value)
            for name, value in mine.items()
            if name.startswith("seconds.")
        },
    )
