"""Every fuzz target under hypothesis, briefly; `make fuzz` runs them for long, guided by coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.codec import decode
from common.wire.messages import MESSAGES
from tests.fuzz.targets import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=400))
@settings(max_examples=250, deadline=None)
def test_any_bytes_whatever_do_no_harm(target: str, data: bytes) -> None:
    TARGETS[target](data)


def test_a_fuzzer_begins_with_one_message_of_each_kind() -> None:
    assert [type(decode(seed)) for seed in seeds()] == list(MESSAGES.values())
    for seed in seeds():
        TARGETS["codec"](seed)
