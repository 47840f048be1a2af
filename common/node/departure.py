"""The states of a choice that is to leave this node: the one table of whoever sends.

A *departure* lasts from the first question where a choice could go on until another node has adopted
it, or it has ended here; each node that is asked is one handoff (kv_transfer/handoff.py). The table says
who has the choice's blocks at any time, and that they are given back once. It knows no I/O, loop or
clock: events go in, actions come out, and sender.py performs them. It is searched exhaustively together
with both ends of the handoff (tests/support/protocol).

A prompt (P) is offered while it is computed. A running sequence (S) stands still before it is offered, so
that no position is computed twice; it *moves*.

    P   here ─▶ opening ─▶ linked ─▶ sending ──computed──▶ committed ──adopted──▶ over
         └─computed─▶ held ─▶ held, opening ───────────────────▲
    S   here ─▶ opening ─▶ linked ─end of a step▶ paused ─▶ granted ──adopted──▶ over
                                                     └─no grant in time─▶ withdrawn ─▶ here

A node that does not take it leads back to `here`, or `held`. What ends here goes to `ending` or
`unwanted` until the handoff or the link that is under way has ended, and then it is `over`.
"""

from __future__ import annotations

import enum
from typing import Any


class State(enum.Enum):
    HERE = "here"  # nothing of it is under way
    OPENING = "opening"  # a link to the chosen node is being opened
    LINKED = "linked"  # the link is open; a running sequence may be in a step still
    SENDING = "sending"  # P: offered, and computed meanwhile
    HELD = "held"  # P: computed; nothing of it is under way
    HELD_OPENING = "held, opening"  # P: computed; a link is being opened
    COMMITTED = "committed"  # P: computed, offered with everything
    PAUSED = "paused"  # S: stands still, offered with everything
    GRANTED = "granted"  # S: the other node has room, and may adopt it at any time
    WITHDRAWN = "withdrawn"  # S: runs here again; the handoff was cancelled and has not ended
    ENDING = "ending"  # it has ended here; the handoff was cancelled and has not ended
    UNWANTED = "unwanted"  # it has ended here; a link is being opened for it
    OVER = "over"


class Event(enum.Enum):
    # Of its owner.
    ASK = "ask"  # a node was chosen
    OFFER = "offer"  # P: now
    PAUSE = "pause"  # S: no step has it
    STAY = "stay"  # S: it cannot be paused as it is
    FILLED = "filled"  # P: more blocks hold their KV
    COMPUTED = "computed"  # P: all of them, and the first token is chosen
    NO_GRANT = "no grant"  # S: not in time
    CANCEL = "cancel"  # it has ended here, or nobody wants it any more
    # Of its link and its handoff.
    OPENED = "opened"
    NOT_OPENED = "not opened"
    GRANT = "grant"
    ADOPTED = "adopted"
    REFUSED = "refused"  # denied, failed, cancelled in vain, or the link is lost
    SPOILED = "spoiled"  # failed, because its blocks are not what they are said to be


class Action(enum.Enum):
    """What a subclass of `Departures` does."""

    # Block references.
    HOLD = "hold"  # take those of the prompt's sequence, which ends
    RELEASE = "release"  # give back what was held
    PAUSE = "pause"  # the sequence keeps its own, and no step writes into them
    RESUME = "resume"
    FINISH = "finish"  # end the paused sequence, and give back its own
    FORGET = "forget"  # no other prompt finds these blocks as its prefix
    # The link and the handoff.
    OPEN_LINK = "open_link"
    OFFER = "offer"
    ANNOUNCE = "announce"  # what is computed and was not announced yet
    COMMIT = "commit"
    WITHDRAW = "withdraw"  # cancel the handoff
    AWAIT_GRANT = "await_grant"
    STOP_WAITING = "stop_waiting"
    # What its owner hears.
    SAY_LINKED = "say_linked"
    SAY_GRANTED = "say_granted"
    SAY_ADOPTED = "say_adopted"
    SAY_REFUSED = "say_refused"
    SAY_SPOILED = "say_spoiled"
    SAY_OVER = "say_over"


S, E, A = State, Event, Action

TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.HERE, E.ASK): (S.OPENING, (A.OPEN_LINK,)),
    (S.HERE, E.COMPUTED): (S.HELD, (A.HOLD,)),
    (S.HERE, E.CANCEL): (S.OVER, (A.SAY_OVER,)),
    #
    (S.OPENING, E.OPENED): (S.LINKED, (A.SAY_LINKED,)),
    (S.OPENING, E.NOT_OPENED): (S.HERE, (A.SAY_REFUSED,)),
    (S.OPENING, E.COMPUTED): (S.HELD_OPENING, (A.HOLD,)),
    (S.OPENING, E.CANCEL): (S.UNWANTED, ()),
    #
    (S.LINKED, E.OFFER): (S.SENDING, (A.OFFER, A.ANNOUNCE)),
    (S.LINKED, E.PAUSE): (S.PAUSED, (A.PAUSE, A.AWAIT_GRANT, A.OFFER, A.ANNOUNCE, A.COMMIT)),
    (S.LINKED, E.STAY): (S.HERE, ()),
    (S.LINKED, E.CANCEL): (S.OVER, (A.SAY_OVER,)),
    #
    (S.SENDING, E.FILLED): (S.SENDING, (A.ANNOUNCE,)),
    (S.SENDING, E.GRANT): (S.SENDING, (A.SAY_GRANTED,)),
    (S.SENDING, E.COMPUTED): (S.COMMITTED, (A.HOLD, A.ANNOUNCE, A.COMMIT)),
    (S.SENDING, E.REFUSED): (S.HERE, (A.SAY_REFUSED,)),
    (S.SENDING, E.SPOILED): (S.HERE, (A.FORGET, A.SAY_SPOILED)),
    (S.SENDING, E.CANCEL): (S.ENDING, (A.WITHDRAW,)),
    #
    (S.HELD, E.ASK): (S.HELD_OPENING, (A.OPEN_LINK,)),
    (S.HELD, E.CANCEL): (S.OVER, (A.RELEASE, A.SAY_OVER)),
    #
    (S.HELD_OPENING, E.OPENED): (S.COMMITTED, (A.OFFER, A.ANNOUNCE, A.COMMIT)),
    (S.HELD_OPENING, E.NOT_OPENED): (S.HELD, (A.SAY_REFUSED,)),
    (S.HELD_OPENING, E.CANCEL): (S.UNWANTED, (A.RELEASE,)),
    #
    (S.COMMITTED, E.GRANT): (S.COMMITTED, (A.SAY_GRANTED,)),
    (S.COMMITTED, E.ADOPTED): (S.OVER, (A.RELEASE, A.SAY_ADOPTED, A.SAY_OVER)),
    (S.COMMITTED, E.REFUSED): (S.HELD, (A.SAY_REFUSED,)),
    (S.COMMITTED, E.SPOILED): (S.HELD, (A.FORGET, A.SAY_SPOILED)),
    (S.COMMITTED, E.CANCEL): (S.ENDING, (A.RELEASE, A.WITHDRAW)),
    #
    (S.PAUSED, E.GRANT): (S.GRANTED, (A.STOP_WAITING, A.SAY_GRANTED)),
    (S.PAUSED, E.NO_GRANT): (S.WITHDRAWN, (A.RESUME, A.WITHDRAW)),
    (S.PAUSED, E.REFUSED): (S.HERE, (A.STOP_WAITING, A.RESUME, A.SAY_REFUSED)),
    (S.PAUSED, E.SPOILED): (S.HERE, (A.STOP_WAITING, A.FORGET, A.RESUME, A.SAY_SPOILED)),
    (S.PAUSED, E.CANCEL): (S.ENDING, (A.STOP_WAITING, A.WITHDRAW)),
    #
    (S.GRANTED, E.ADOPTED): (S.OVER, (A.FINISH, A.SAY_ADOPTED, A.SAY_OVER)),
    (S.GRANTED, E.REFUSED): (S.HERE, (A.RESUME, A.SAY_REFUSED)),
    (S.GRANTED, E.SPOILED): (S.HERE, (A.FORGET, A.RESUME, A.SAY_SPOILED)),
    (S.GRANTED, E.CANCEL): (S.ENDING, (A.WITHDRAW,)),
    #
    (S.WITHDRAWN, E.REFUSED): (S.HERE, (A.SAY_REFUSED,)),
    (S.WITHDRAWN, E.CANCEL): (S.ENDING, ()),
    #
    (S.ENDING, E.ADOPTED): (S.OVER, (A.SAY_OVER,)),
    (S.ENDING, E.REFUSED): (S.OVER, (A.SAY_OVER,)),
    #
    (S.UNWANTED, E.OPENED): (S.OVER, (A.SAY_OVER,)),
    (S.UNWANTED, E.NOT_OPENED): (S.OVER, (A.SAY_OVER,)),
}

# Events that change nothing, and why.
LATE: dict[tuple[State, Event], str] = {
    **{(s, E.FILLED): "the offer will announce it" for s in (S.HERE, S.OPENING)},
    **{(s, E.FILLED): "all was announced" for s in (S.HELD, S.HELD_OPENING, S.COMMITTED)},
    **{(s, E.FILLED): "nobody wants it any more" for s in (S.ENDING, S.UNWANTED, S.OVER)},
    **{(s, E.CANCEL): "it has ended here already" for s in (S.ENDING, S.UNWANTED, S.OVER)},
}

# Why all other pairs never come. One that comes is a fault of this program, and is raised.
IMPOSSIBLE: dict[Event, str] = {
    E.ASK: "one node is asked at a time, and only for what is still here",
    E.OFFER: "a prompt is offered at once on a link that has opened",
    E.PAUSE: "a sequence is paused for a link that has opened, and once",
    E.STAY: "a sequence that is paused is not looked at again",
    E.FILLED: "a prompt is offered as soon as its link is open, and a running sequence fills no prompt",
    E.COMPUTED: "the first token of a prompt is chosen once, and of none that has ended",
    E.NO_GRANT: "its timer runs from the offer to its answer",
    E.CANCEL: "it may come in every state",
    E.OPENED: "one link is opened at a time",
    E.NOT_OPENED: "one link is opened at a time",
    E.GRANT: "a handoff is granted once, before it ends and before it is cancelled",
    E.ADOPTED: "nothing is adopted that was not committed, nor committed without a grant",
    E.REFUSED: "a handoff ends once",
    E.SPOILED: "a handoff ends once, and one that was cancelled does not end as failed",
}

OPENING = frozenset({S.OPENING, S.HELD_OPENING, S.UNWANTED})
HOLDING = frozenset({S.HELD, S.HELD_OPENING, S.COMMITTED})  # the departure has block references
STANDING = frozenset({S.PAUSED, S.GRANTED})  # its sequence has them, and is in no step
ENDED_HERE = frozenset({S.ENDING, S.UNWANTED, S.OVER})  # neither has any
COMPUTING = frozenset({S.HERE, S.OPENING, S.LINKED, S.SENDING})  # a prompt without its first token
IDLE = frozenset({S.HERE, S.HELD, S.OVER})  # no link is opened for it, and no handoff under way


def answer(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """What follows `event` in `state`; `AssertionError` if that can never come."""
    pair = state, event
    if pair in TABLE:
        return TABLE[pair]
    assert pair in LATE, f"{event.value} while {state.value}: {IMPOSSIBLE[event]}"
    return state, ()


class Departures:
    """Runs the table. A subclass has a method for each action, which takes the departure: `_hold`, …

    What an action leads to at once, such as a handoff that ends because its link is found down, is an
    event of its own: it comes after all actions of the event before.
    """

    def __init__(self) -> None:
        self._events: list[tuple[Any, Event]] = []
        self._is_acting = False

    def take(self, departure: Any, event: Event) -> None:
        """Something has happened to a departure, an object with a `state`."""
        self._events.append((departure, event))
        if self._is_acting:
            return
        self._is_acting = True
        try:
            while self._events:
                departure, event = self._events.pop(0)
                departure.state, actions = answer(departure.state, event)
                for action in actions:
                    getattr(self, "_" + action.value)(departure)
        finally:
            self._is_acting = False
