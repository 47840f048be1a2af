"""What the crash of a node says about the requests that it had begun."""

from __future__ import annotations

import pytest

from gateway.suspicion import TOGETHER, Suspicion, Verdict


@pytest.mark.parametrize(
    ("suspected", "alone", "verdict"),
    [
        (False, TOGETHER, Verdict.SUSPECT),
        (False, None, Verdict.SUSPECT),
        (False, "r/1", Verdict.SUSPECT),  # another gateway's suspicion is not ours
        (False, "other/2", Verdict.CLEAR),
        (True, TOGETHER, Verdict.SUSPECT),
        (True, None, Verdict.SUSPECT),
        (True, "other/2", Verdict.SUSPECT),
        (True, "r/2", Verdict.SUSPECT),  # an attempt that was given up before
        (True, "r/1", Verdict.GUILTY),
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
