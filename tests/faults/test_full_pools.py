"""Pools that hold one prompt and little more: everybody waits for his turn, nobody for ever."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from common.engine import Engine
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth

POOL = 20 * 16  # token positions


@pytest.fixture(scope="module")
def tiny() -> Iterator[Deployment]:
    flags = ("--num-kv-blocks", "20")
    with Deployment(STORIES, prefill=1, decode=2, flags=flags) as deployment:
        yield deployment


async def test_long_prompts_on_tiny_pools_all_end(tiny: Deployment, engine: Engine) -> None:
    asked = bodies(20, prompt=(200, 240), max_tokens=(20, 60))
    expected = truth(engine, asked)
    async with Load(tiny.url, asked) as load:
        await load.finish(expected)
    await tiny.assert_idle()


async def test_clients_that_leave_free_their_room(tiny: Deployment, engine: Engine) -> None:
    asked = bodies(20, prompt=(200, 240), max_tokens=(20, 60), seed=2)
    expected = truth(engine, asked[:4])
    async with Load(tiny.url, asked):
        pass  # all leave at once, wherever their requests are
    await tiny.assert_idle()
    async with Load(tiny.url, asked[:4]) as load:
        await load.finish(expected)
    await tiny.assert_idle()


@pytest.mark.parametrize(("prompt", "max_tokens"), [(POOL + 20, 1), (200, POOL)])
async def test_what_never_fits_is_refused_at_once(tiny: Deployment, prompt: int, max_tokens: int) -> None:
    body = {"model": STORIES.name, "prompt": [5] * prompt, "max_tokens": max_tokens}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{tiny.url}/v1/completions", json=body, timeout=30.0)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in ("prompt", "max_tokens")
    assert "pool" in error["message"] or "context" in error["message"]


@pytest.mark.parametrize("prompt", [POOL - 1, POOL])
async def test_what_just_fits_is_served(tiny: Deployment, prompt: int) -> None:
    body = {"model": STORIES.name, "prompt": [5] * prompt, "max_tokens": POOL - prompt + 1}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{tiny.url}/v1/completions", json=body, timeout=120.0)
    assert answer.status_code == 200, answer.text
    await tiny.assert_idle()
