"""Which requests may be what makes steps fail, and which of them does.

Owns: the suspects of this node and in which steps they are computed. Has no I/O and knows nothing of
engines: steps are reported to it by the requests that were in them, each with the position that it
reached, or would have.

    clear ──in a step that failed, or its gateway says so──▶ suspect: computed in steps of its own
      ▲                                                        │            │
      └── past the position at which the step failed ──────────┘            │ a step of its own fails
                                                                            ▼
                                                                     guilty: it ends here

Steps of a suspect, IN_A_ROW at most, and steps of all that are clear take turns, so that nobody waits
long for a suspect and no suspect for ever; each change is written down for the gateways (steps.py).
A step that fails is never proof by itself: a request is guilty when a second step fails that had
nobody else in it.

Where a failure cannot be explained, because everybody in the step gets past it alone, the engine may
be what is broken: after UNEXPLAINED of them, with no step of several in between that went well, it
counts as that.
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
        self._failures = 0  # that nobody was found guilty of
        self._open = False  # the last of them is still looked into

    def __contains__(self, request: str) -> bool:
        return request in self._until

    def __len__(self) -> int:
        return len(self._until)

    @property
    def unexplained(self) -> bool:
        """Too many steps failed for no reason that lies in a request."""
        return self._failures >= UNEXPLAINED

    def suspect(self, request: str, until: int) -> None:
        """Compute it by itself up to this position."""
        self._until[request] = max(until, self._until.get(request, 0))

    def turns(self) -> Iterator[str]:
        """The steps that may come next, the first that can be made: each a suspect's own, or that of
        all who are clear ("")."""
        again = self._last in self._until and self._row < IN_A_ROW
        if again:
            yield self._last
        if self._last or not self._until:
            yield ""
        yield from (request for request in tuple(self._until) if not again or request != self._last)
        if self._until and not self._last:
            yield ""

    def passed(self, alone: str, members: Mapping[str, int]) -> None:
        """A step went well: `members` are by now at these positions."""
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
        """A step failed; who is guilty of it, or "" while that is to be found out."""
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
        """It has ended."""
        if self._until.pop(request, None) is not None:
            self._look_closed()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._until))

    def _look_closed(self) -> None:
        if not self._until:
            self._open = False
