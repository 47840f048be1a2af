"""Which open requests may crash nodes, and which one does.

Owns: the suspects, and the verdict on each request that a node took with it. Does no I/O, and knows
nothing of attempts, tries or how a death is noticed.

A node that crashes says nothing. But before it computes a step of one suspect alone, it writes that into
its record (`NodeRecord.alone`). Without such a mark it was computing a step of several requests: any that
it had begun may be the cause, so each is suspected, and dispatched to be computed in steps of its own
(`Dispatch.alone`). Hence one request takes at most two nodes with it.

| the request was | the node computed | verdict |
|---|---|---|
| clear | several together, or nobody knows | suspect |
| clear | another one alone | clear |
| suspect | several together, nothing, or nobody knows | suspect |
| suspect | another one alone | suspect |
| suspect | this one alone, before or behind where the first crash can have been | suspect |
| suspect | this one alone | guilty |

A node may also be killed from outside, by a person or for want of memory, and so may the node where its
requests are retried. A request that crashes nodes crashes each at the same position. So a crash does not
count within what another node has computed already (the delivered tokens), nor after a further token.
"""

from __future__ import annotations

import enum

TOGETHER = ""  # a step of several, or none, as `NodeRecord.alone` has it


class Verdict(enum.Enum):
    CLEAR = "clear"
    SUSPECT = "suspect"
    GUILTY = "guilty"


class Suspicion:
    """The suspects among the requests of one gateway, by id."""

    def __init__(self) -> None:
        self._suspects: set[str] = set()

    def __contains__(self, request: str) -> bool:
        return request in self._suspects

    def __len__(self) -> int:
        return len(self._suspects)

    def suspect(self, request: str) -> None:
        """Suspect a request that was in a step in which an engine broke."""
        self._suspects.add(request)

    def judge(
        self, request: str, attempt: int, alone: str | None, *, proved: int = 0, came_on: bool = False
    ) -> Verdict:
        """Judge a request that a node had begun when it crashed. `alone` is what the node's record said,
        "request/attempt@position" or TOGETHER, and None if it could not be read. Steps up to positions
        below `proved` went well on another node. `came_on`: the node that crashed had sent a token of it."""
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
        """Forget a request that has ended."""
        self._suspects.discard(request)
