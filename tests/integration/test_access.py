"""Who may ask, and in which form: keys, names and types of bodies, over the app itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common.settings.config import GatewaySettings
from gateway.access import Access
from gateway.app import create_app
from gateway.routes import ROUTES
from tests.support.fake_cluster import FakeCluster
from tests.support.gateway_server import make_service, serving

GOOD: dict[str, Any] = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 3}
BODY = json.dumps(GOOD).encode()
JSON = "application/json"
POSTS = [path for method, path, _ in ROUTES if method == "POST"]
GETS = [path.replace("{name:path}", "stories") for method, path, _ in ROUTES if method == "GET"]

LOCAL = Access.of(GatewaySettings())
KEYED = Access(("sk-one", "sk-two"))


@contextlib.asynccontextmanager
async def app(access: Access) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway with one node; what was asked for is in its `cluster`."""
    cluster = FakeCluster()
    cluster.add("u1")
    service = make_service(cluster, access=access)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        client.cluster = cluster  # type: ignore[attr-defined]
        yield client
    await service.dispatcher.shut_down()


def dispatched(client: httpx.AsyncClient) -> int:
    return len(client.cluster.dispatched)  # type: ignore[attr-defined]


def error(answer: httpx.Response) -> tuple[int, str]:
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return answer.status_code, body["code"]


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"Bearer wrong",
        b"Basic sk-one",
        b"Bearer",
        b"Bearer ",
        b"sk-one",
        b"Bearer \xff",
        b"Bearer sk-one,sk-two",
        b"Bearer sk-on",
        b"Bearer sk-onee",
    ],
)
@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/models/stories"])
async def test_without_a_key_nothing_is_served(path: str, header: bytes | None) -> None:
    headers = [(b"content-type", JSON.encode())]
    headers += [(b"authorization", header)] if header is not None else []
    async with app(KEYED) as client:
        method = "POST" if path in POSTS else "GET"
        answer = await client.request(method, path, headers=headers, content=BODY)
        assert error(answer) == (401, "invalid_api_key")
        assert dispatched(client) == 0


@pytest.mark.parametrize("header", ["Bearer sk-one", "bearer sk-two", "Bearer   sk-one "])
async def test_any_of_the_keys_will_do(header: str) -> None:
    async with app(KEYED) as client:
        headers = {"authorization": header}
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).is_success
        assert (await client.get("/v1/models", headers=headers)).is_success


async def test_keys_of_a_file_and_of_the_environment_count_alike(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nsk-file\n")
    path.chmod(0o600)
    settings = GatewaySettings(api_keys=("sk-env",), api_key_file=str(path))
    async with app(Access.of(settings)) as client:
        for key, status in (("sk-file", 200), ("sk-env", 200), ("# ours", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == status


# ── What a web page could send ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "text/plain, application/json",
        "application/jsonp",
        "application/json, text/plain",
        "text/json",
        "json",
    ],
)
@pytest.mark.parametrize("path", POSTS)
async def test_a_body_that_does_not_say_it_is_json_is_refused(path: str, kind: str | None) -> None:
    """A page of any origin may post these three types of form, and a body without a type."""
    async with app(LOCAL) as client:
        headers = {} if kind is None else {"content-type": kind}
        answer = await client.post(path, content=BODY, headers=headers)
        assert error(answer) == (415, "unsupported_media_type")
        assert dispatched(client) == 0


@pytest.mark.parametrize(
    "kind", [JSON, "Application/JSON", "application/json; charset=utf-8", "application/vnd.x+json"]
)
async def test_json_is_taken_under_any_of_its_names(kind: str) -> None:
    async with app(LOCAL) as client:
        headers = {"content-type": kind}
        assert (await client.post("/v1/completions", content=BODY, headers=headers)).is_success


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "192.0.2.1:8000"},
        {"host": "user@localhost@evil.example"},
        {"host": "[::1"},
        {"origin": "http://evil.example"},
        {"origin": "https://localhost.evil.example"},
        {"origin": "null"},
    ],
)
@pytest.mark.parametrize("path", [*POSTS, *GETS])
async def test_a_page_that_has_its_name_lead_here_is_refused(path: str, headers: dict[str, str]) -> None:
    """DNS rebinding: to the browser it is the page's own server, which it may send JSON and read."""
    async with app(LOCAL) as client:
        method = "POST" if path in POSTS else "GET"
        answer = await client.request(method, path, content=BODY, headers={"content-type": JSON, **headers})
        assert error(answer) == (403, "host_not_allowed")
        assert dispatched(client) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost:8000"},
        {"host": "LOCALHOST."},
        {"host": "127.0.0.1:8000", "origin": "http://localhost:3000"},
        {"host": "[::1]:8000"},
        {"host": "gateway:8000"},
    ],
)
async def test_this_machine_and_names_that_were_added_are_known(headers: dict[str, str]) -> None:
    settings = GatewaySettings(host="0.0.0.0", published_host="127.0.0.1", allowed_hosts=("Gateway",))
    async with app(Access.of(settings)) as client:
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).is_success


@pytest.mark.parametrize(
    "settings",
    [
        GatewaySettings(api_keys=("sk-one",)),
        GatewaySettings(host="0.0.0.0", api_keys=("sk-one",)),
        GatewaySettings(host="0.0.0.0", allow_unauthenticated=True),
    ],
    ids=["loopback-keyed", "public-keyed", "public-open"],
)
async def test_where_a_key_is_asked_for_or_everybody_may_come_any_name_will_do(
    settings: GatewaySettings,
) -> None:
    headers = {"host": "api.example.org", "authorization": "Bearer sk-one"}
    async with app(Access.of(settings)) as client:
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).is_success


async def test_no_page_of_another_origin_is_told_that_it_may_ask() -> None:
    async with app(LOCAL) as client:
        asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
        for answer in (
            await client.options("/v1/completions", headers=asked),
            await client.post("/v1/completions", json=GOOD, headers={"origin": asked["origin"]}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_the_official_client_and_a_browser_on_this_machine_notice_nothing() -> None:
    cluster = FakeCluster()
    cluster.add("u1")
    async with (
        serving(cluster, access=LOCAL) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert (await client.completions.create(**GOOD)).choices[0].text
