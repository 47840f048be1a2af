"""What a client asked for, for tests that need one and do not care about most of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.identity import ModelIdentity
from common.request import Request
from common.sampling import SamplingParams


def a_request(
    token_ids: Iterable[int] = (1, 2, 3), params: SamplingParams | None = None, name: str = "r", **fields: Any
) -> Request:
    """All its tokens are prompt, but for those beyond `prompt_len`."""
    tokens = tuple(token_ids)
    fields = {"model": ModelIdentity("tiny", "", ""), "prompt_len": len(tokens)} | fields
    return Request(id=name, token_ids=tokens, params=params or SamplingParams(), **fields)
