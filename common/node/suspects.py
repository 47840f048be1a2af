"""Finds out which request makes steps fail.

Owns the suspects of this node, and which steps compute them. Has no I/O and knows nothing of engines:
its caller reports each step by the requests that were in it, each with the position that it reached, or
would have reached.

    clear ──in a step that failed, or its gateway says so──▶ suspect: computed in steps of its own
      ▲                                                        │            │
      └── past the position at which the step failed ──────────┘            │ a step of its own fails
                                                                            ▼
                                                                     guilty: it ends here

Steps of a suspect, IN_A_ROW at most, and steps of all that are clear take turns, so that nobody waits
long for a suspect and no suspect waits for ever; steps.py writes each change down for the gateways.
One failed step proves nothing: a request is guilty when a second step fails that had nobody else in it.

If everybody in a failed step gets past it alone, no request explains the failure, and the engine may be
broken. It counts as broken after UNEXPLAINED of such failures with no step of several requests in between
that went well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

UNEXPLAINED = 3
IN_A_ROW = 2


class Suspects:
    """Requests are named as the engine names them."""

    def __init__(self) -> None:
        self._until: dict[str, int] = {}  # suspect → the position past which it is clear
        self._last = ""  # whose step came last; "": of those that are clear
        self._row = 0  # how many of one suspect came last
        self._failures = 0  # of which nobody was found guilty
        self._open = False  # the last failure is not explained yet

    def __contains__(self, request: str) -> bool:
        return request in self._until

    def __len__(self) -> int:
        return len(self._until)

    @property
    def unexplained(self) -> bool:
        """Whether too many steps failed of which no request is guilty."""
        return self._failures >= UNEXPLAINED

    def suspect(self, request: str, until: int) -> None:
        """Compute it by itself up to this position."""
        self._until[request] = max(until, self._until.get(request, 0))

    def turns(self) -> Iterator[str]:
        """Whose step may come next, in the order of preference: a suspect alone, or all who are clear
        ("")."""
        again = self._last in self._until and self._row < IN_A_ROW
        if again:
            yield self._last
        if self._last or not self._until:
            yield ""
        yield from (request for request in tuple(self._until) if not again or request != self._last)
        if self._until and not self._last:
            yield ""

    def passed(self, alone: str, members: Mapping[str, int]) -> None:
        """A step went well; `members` have reached these positions."""
        self._row = self._row + 1 if alone == self._last else 1
        self._last = alone
        if not alone:
            if len(members) > 1 and not self._until:
                self._failures = 0
        elif alone in self._until:
            until = self._until.pop(alone)
            if members[alone] < until:
                self._until[alone] = until  # behind the others
            self._look_closed()

    def failed(self, alone: str, members: Mapping[str, int]) -> str:
        """A step failed. Returns who is guilty of it, or "" while nobody knows."""
        self._last, self._row = alone, 0
        if alone:
            self._until.pop(alone, None)
            self._failures, self._open = 0, False
            return alone
        if not self._open:
            self._failures, self._open = self._failures + 1, True
        for request, position in members.items():
            self.suspect(request, position)
        return ""

    def forget(self, request: str) -> None:
        """The request has ended."""
        if self._until.pop(request, None) is not None:
            self._look_closed()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._until))

    def _look_closed(self) -> None:
        if not self._until:
            self._open = False
