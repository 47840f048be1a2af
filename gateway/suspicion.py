"""Which open requests may be what nodes die of, and which one is.

Owns: the suspects, and the verdict on each request that a node took with it. Has no I/O and knows
nothing of attempts, tries or how a death is noticed.

A node that crashes says nothing. In its record stands, written before the step, whose step of its own
it began (`NodeRecord.alone`): of a request that had been suspected before. Otherwise it computed a step
of several: then every request that it had begun may be the one, so each is suspected, and dispatched to
be computed in steps of its own (`Dispatch.alone`). Hence one request takes two nodes with it at most.

| the request was | the node computed | verdict |
|---|---|---|
| clear | several together, or nobody knows | suspect |
| clear | another one alone | clear |
| suspect | several together, or nobody knows | suspect |
| suspect | another one alone | suspect |
| suspect | this one alone | guilty |
"""

from __future__ import annotations

import enum

TOGETHER = ""  # a step of several, as `NodeRecord.alone` has it


class Verdict(enum.Enum):
    CLEAR = "clear"
    SUSPECT = "suspect"
    GUILTY = "guilty"


class Suspicion:
    """Of the requests of one gateway, by their ids."""

    def __init__(self) -> None:
        self._suspects: set[str] = set()

    def __contains__(self, request: str) -> bool:
        return request in self._suspects

    def __len__(self) -> int:
        return len(self._suspects)

    def suspect(self, request: str) -> None:
        """It was in a step with which an engine broke."""
        self._suspects.add(request)

    def judge(self, request: str, attempt: int, alone: str | None) -> Verdict:
        """Of a request that a node had begun when it crashed. `alone`: what the node's record said,
        "request/attempt" or TOGETHER; None: it could not be read."""
        mine = f"{request}/{attempt}"
        if request in self._suspects:
            return Verdict.GUILTY if alone == mine else Verdict.SUSPECT
        if alone not in (None, TOGETHER, mine):
            return Verdict.CLEAR
        self._suspects.add(request)
        return Verdict.SUSPECT

    def forget(self, request: str) -> None:
        """It has ended."""
        self._suspects.discard(request)
