"""Keeps tokens until their gateway has acknowledged them.

Owns the unacknowledged tokens of each choice of an attempt, and packs one message per gateway and step.
Acknowledgements are cumulative by position; a new link gets everything again that is not acknowledged.
Has no I/O of its own: messages out, acknowledgements in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from common.wire.messages import TokenRun, Tokens

RESENT_AT_ONCE = 256  # runs in one message


class ChoiceKey(NamedTuple):
    """One choice of one attempt."""

    request: str
    attempt: int
    choice: int

    @property
    def engine_id(self) -> str:
        """What the engine calls its attempt: attempts of one request never mix."""
        return f"{self.request}/{self.attempt}"


@dataclasses.dataclass(slots=True)
class _Unacknowledged:
    gateway: str
    runs: list[TokenRun]


class TokenStream:
    """`send(gateway, message)` may drop the message when there is no link; then `resend` repairs."""

    def __init__(self, node: str, send: Callable[[str, Tokens], None]) -> None:
        self._node = node
        self._send = send
        self._kept: dict[ChoiceKey, _Unacknowledged] = {}

    def push(self, runs: Iterable[tuple[str, TokenRun]]) -> None:
        """Send the runs of one step, (gateway, run) each: one message per gateway."""
        by_gateway: dict[str, list[TokenRun]] = {}
        for gateway, run in runs:
            key = ChoiceKey(run.request, run.attempt, run.choice)
            self._kept.setdefault(key, _Unacknowledged(gateway, [])).runs.append(run)
            by_gateway.setdefault(gateway, []).append(run)
        for gateway, sent in by_gateway.items():
            self._send(gateway, Tokens(self._node, tuple(sent)))

    def acknowledge(self, gateway: str, key: ChoiceKey, below: int) -> None:
        """Every position below `below` has arrived. Ignored for a choice that is unknown or over, or
        belongs to another gateway."""
        kept = self._kept.get(key)
        if kept is None or kept.gateway != gateway:
            return
        kept.runs = [run for run in kept.runs if run.end > below]
        if not kept.runs:
            del self._kept[key]

    def resend(self, gateway: str, only: ChoiceKey | None = None) -> bool:
        """Send again, in order, what this gateway has not acknowledged, of all choices or of one. False
        if there is nothing."""
        runs = [
            run
            for key, kept in ([(only, self._kept.get(only))] if only else self._kept.items())
            if kept is not None and kept.gateway == gateway
            for run in kept.runs
        ]
        for start in range(0, len(runs), RESENT_AT_ONCE):
            self._send(gateway, Tokens(self._node, tuple(runs[start : start + RESENT_AT_ONCE])))
        return bool(runs)

    def forget(self, gateway: str, request: str, attempt: int, choices: Collection[int] = ()) -> None:
        """Drop the tokens of these choices (of all, if none is named) of a gateway's request, in attempts
        up to this one: it wants no more of them."""
        for key, kept in list(self._kept.items()):
            wanted = kept.gateway == gateway and (not choices or key.choice in choices)
            if wanted and key.request == request and key.attempt <= attempt:
                del self._kept[key]

    def forget_gateway(self, gateway: str) -> None:
        for key in [key for key, kept in self._kept.items() if kept.gateway == gateway]:
            del self._kept[key]

    @property
    def num_unacknowledged(self) -> int:
        """Number of choices with unacknowledged tokens; 0 when idle."""
        return len(self._kept)
