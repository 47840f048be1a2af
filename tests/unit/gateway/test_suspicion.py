"""What the crash of a node says about the requests that it had begun."""

from __future__ import annotations

import pytest

from gateway.suspicion import TOGETHER, Suspicion, Verdict


@pytest.mark.parametrize(
    ("suspected", "alone", "verdict"),
    [
        (False, TOGETHER, Verdict.SUSPECT),
        (False, None, Verdict.SUSPECT),
        (False, "r/1@9", Verdict.SUSPECT),  # another gateway's suspicion is not ours
        (False, "other/2@9", Verdict.CLEAR),
        (True, TOGETHER, Verdict.SUSPECT),
        (True, None, Verdict.SUSPECT),
        (True, "other/2@9", Verdict.SUSPECT),
        (True, "r/2@9", Verdict.SUSPECT),  # an attempt that was given up before
        (True, "r/1@9", Verdict.GUILTY),
    ],
)
def test_the_verdict(suspected: bool, alone: str | None, verdict: Verdict) -> None:
    suspicion = Suspicion()
    if suspected:
        suspicion.suspect("r")
    assert suspicion.judge("r", 1, alone) is verdict
    assert ("r" in suspicion) == (verdict is not Verdict.CLEAR)
    suspicion.forget("r")
    assert not suspicion


@pytest.mark.parametrize(
    ("alone", "proved", "came_on", "verdict"),
    [
        ("r/1@30", 30, False, Verdict.GUILTY),
        ("r/1@29", 30, False, Verdict.SUSPECT),  # of what the first node had computed
        ("r/1@30", 30, True, Verdict.SUSPECT),  # it is past that
        ("r/1@", 0, False, Verdict.SUSPECT),
        ("r/1", 0, False, Verdict.SUSPECT),
    ],
)
def test_only_a_crash_where_the_first_one_can_have_been_is_proof(
    alone: str, proved: int, came_on: bool, verdict: Verdict
) -> None:
    suspicion = Suspicion()
    suspicion.suspect("r")
    assert suspicion.judge("r", 1, alone, proved=proved, came_on=came_on) is verdict
    assert "r" in suspicion
