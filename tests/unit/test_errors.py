"""What an error may carry."""

from __future__ import annotations

from common.errors import LONGEST_MESSAGE, LONGEST_PARAM, InvalidRequest


def test_a_message_is_bounded_and_keeps_its_two_ends() -> None:
    error = InvalidRequest("begin" + "x" * 10**6 + "end", param="p" * 10**6)
    assert len(str(error)) < LONGEST_MESSAGE + 50
    assert len(error.param or "") < LONGEST_PARAM + 50
    assert error.message.startswith("begin")
    assert error.message.endswith("end")


def test_an_ordinary_message_is_left_alone() -> None:
    error = InvalidRequest("n must be at least 1", param="n")
    assert (error.message, error.param, str(error)) == ("n must be at least 1", "n", error.message)
