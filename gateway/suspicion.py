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
| suspect | several together, nothing, or nobody knows | suspect |
| suspect | another one alone | suspect |
| suspect | this one alone, before or behind where the first crash can have been | suspect |
| suspect | this one alone | guilty |

A node may be killed from outside, by a person or for want of memory, and then again the one where its
requests are tried. What makes a node crash does so again where it did: so no crash counts within what
another node has computed already, the tokens that were delivered, nor after a further token.
"""

from __future__ import annotations

import enum

TOGETHER = ""  # a step of several, or none, as `NodeRecord.alone` has it


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

    def judge(
        self, request: str, attempt: int, alone: str | None, *, proved: int = 0, came_on: bool = False
    ) -> Verdict:
        """Of a request that a node had begun when it crashed. `alone`: what the node's record said,
        "request/attempt@position" or TOGETHER; None: it could not be read. Steps up to positions
        below `proved` went well before, elsewhere. `came_on`: that node had sent a token of it."""
        whose, _, end = (alone or "").rpartition("@")
        mine = whose == f"{request}/{attempt}"
        if request in self._suspects:
            again = mine and end.isdecimal() and int(end) >= proved and not came_on
            return Verdict.GUILTY if again else Verdict.SUSPECT
        if alone not in (None, TOGETHER) and not mine:
            return Verdict.CLEAR
        self._suspects.add(request)
        return Verdict.SUSPECT

    def forget(self, request: str) -> None:
        """It has ended."""
        self._suspects.discard(request)
