"""The gateway over real HTTP: the official client, errors, disconnects; the nodes are fakes."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common.errors import ServiceUnavailable
from common.wire.messages import Dispatch, Failed
from gateway.app import create_app
from gateway.placement import DispatchLimits
from gateway.service import ServiceLimits
from gateway.tokenizer import Tokenizer
from tests.support.fake_cluster import EOS, FakeCluster, pair, until
from tests.support.gateway_server import MODELS, Served, load_tokenizer, make_service, serving

STORIES = load_tokenizer("stories260K")
QWEN = load_tokenizer("tokenizers/qwen2")
TEXT = " there was a little girl. 👩‍👧 She was happy.\nThe end."
PROMPT = "Once upon a time"
JSON = {"content-type": "application/json"}


def telling(text: str, tokenizer: Tokenizer = STORIES, end: tuple[int, ...] = (EOS,)) -> Any:
    """Nodes that answer every prompt with `text`, then end of sequence."""
    ids = [*tokenizer.encode_now(text.removeprefix(" "), add_special_tokens=False), *end]
    return lambda dispatch, choice: ids


TEXT_TOKENS = len(telling(TEXT)(None, 0))


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    cluster = FakeCluster(telling(TEXT))
    pair(cluster)
    async with serving(cluster) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url, timeout=20) as made:
        yield made


# ── Completions ──────────────────────────────────────────────────────────────────────────────────


async def test_a_completion(served: Served, client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=200, temperature=0.7, seed=5
    )
    (choice,) = got.choices
    assert choice.text == TEXT
    assert choice.finish_reason == "stop"
    prompt_len = len(STORIES.encode_now(PROMPT))
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt_len, TEXT_TOKENS)
    ((_, dispatch),) = served.cluster.dispatched
    assert dispatch.request.token_ids == tuple(STORIES.encode_now(PROMPT))
    assert (dispatch.request.params.seed, dispatch.request.params.temperature) == (5, 0.7)


async def test_a_stream_is_the_same_text_in_pieces(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TEXT_TOKENS
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_max_tokens_ends_it_by_length(client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(model="stories", prompt=PROMPT, max_tokens=3)
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert got.usage.completion_tokens == 3


async def test_sixteen_tokens_are_the_default(client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(model="stories", prompt=PROMPT)
    assert got.usage is not None
    assert got.usage.completion_tokens == 16


async def test_prompts_in_four_forms(served: Served, client: openai.AsyncOpenAI) -> None:
    ids, other = STORIES.encode_now(PROMPT), STORIES.encode_now("A dog")
    forms: list[tuple[Any, list[list[int]]]] = [
        (PROMPT, [ids]),
        ([PROMPT, "A dog"], [ids, other]),
        (ids, [ids]),
        ([ids, other], [ids, other]),
    ]
    for prompt, wanted in forms:
        served.cluster.dispatched.clear()
        got = await client.completions.create(model="stories", prompt=prompt, max_tokens=200)
        assert [choice.text for choice in got.choices] == [TEXT] * len(wanted)
        assert [choice.index for choice in got.choices] == list(range(len(wanted)))
        dispatched = sorted(dispatch.request.token_ids for _, dispatch in served.cluster.dispatched)
        assert dispatched == sorted(map(tuple, wanted))
        assert got.usage is not None
        assert got.usage.prompt_tokens == sum(map(len, wanted))
        assert got.usage.completion_tokens == TEXT_TOKENS * len(wanted)


async def test_n_choices_of_several_prompts_are_numbered_prompt_first(
    served: Served, client: openai.AsyncOpenAI
) -> None:
    served.cluster.reply = lambda dispatch, choice: telling(f"{len(dispatch.request.token_ids)} {choice}")(
        dispatch, choice
    )
    prompts = ["A dog", PROMPT]
    lengths = [len(STORIES.encode_now(prompt)) for prompt in prompts]
    wanted = [f" {length} {choice}" for length in lengths for choice in range(3)]
    got = await client.completions.create(model="stories", prompt=prompts, n=3)
    assert [choice.text for choice in got.choices] == wanted
    texts = [""] * 6
    stream = await client.completions.create(model="stories", prompt=prompts, n=3, stream=True)
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_cut_the_text_and_end_the_work(
    served: Served, client: openai.AsyncOpenAI, stream: bool
) -> None:
    served.cluster.members["d1"].hold_at = TEXT_TOKENS - 8  # it could not finish by itself
    create = client.completions.create
    options: dict[str, Any] = {"model": "stories", "prompt": PROMPT, "max_tokens": 200}
    if stream:
        chunks = [c async for c in await create(**options, stop=["y.\n", "girl. "], stream=True)]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        got = await create(**options, stop=["y.\n", "girl. "])
        text, reason = got.choices[0].text, got.choices[0].finish_reason
    assert text == " there was a little "
    assert reason == "stop"
    await until(lambda: served.cluster.running == 0, "the node was told")


async def test_stop_strings_count_only_after_min_tokens(client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=200, stop=" ", extra_body={"min_tokens": 12}
    )
    text = got.choices[0].text
    assert " " in text
    assert TEXT.startswith(text + " ")
    assert got.usage is not None
    assert got.usage.completion_tokens > 12


async def test_the_folder_limits_the_context_even_where_nodes_allow_more(
    served: Served, http: httpx.AsyncClient
) -> None:
    served.cluster.add("u1", max_model_len=4096, total_blocks=4096)
    answer = await http.post("/v1/completions", json={**GOOD, "max_tokens": 600})
    assert answer.json()["error"]["param"] == "max_tokens"
    assert served.cluster.dispatched == []


async def test_stop_token_ids_are_passed_on_and_not_shown(served: Served, client: openai.AsyncOpenAI) -> None:
    (last,) = STORIES.encode_now("x", add_special_tokens=False)[-1:]
    served.cluster.reply = telling(" a dog", end=(last,))
    got = await client.completions.create(
        model="stories", prompt=PROMPT, extra_body={"stop_token_ids": [last]}
    )
    assert got.choices[0].text == " a dog"
    assert served.cluster.dispatched[0][1].request.params.stop_token_ids == (last,)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_the_prompt_first(client: openai.AsyncOpenAI, stream: bool) -> None:
    for prompt in (PROMPT, STORIES.encode_now(PROMPT)):
        if stream:
            chunks = await client.completions.create(
                model="stories", prompt=prompt, max_tokens=200, echo=True, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in chunks])
        else:
            got = await client.completions.create(model="stories", prompt=prompt, max_tokens=200, echo=True)
            text = got.choices[0].text
        assert text == PROMPT + TEXT


async def test_logprobs_in_openais_shape(client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(model="stories", prompt=PROMPT, max_tokens=5, logprobs=2)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    ids = telling(TEXT)(None, 0)[:5]
    assert logprobs.token_logprobs == [-token_id / 1000 for token_id in ids]
    assert "".join(logprobs.tokens or []) == got.choices[0].text
    assert logprobs.text_offset is not None
    starts = [*logprobs.text_offset, len(got.choices[0].text)]
    pieces = [got.choices[0].text[a:b] for a, b in itertools.pairwise(starts)]
    assert pieces == logprobs.tokens
    assert all(len(top) == 3 for top in logprobs.top_logprobs or [])


async def test_streamed_logprobs_are_those_of_the_whole(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": "stories", "prompt": PROMPT, "max_tokens": 200, "logprobs": 1}
    whole = (await client.completions.create(**options)).choices[0].logprobs
    tokens: list[str] = []
    offsets: list[int] = []
    async for chunk in await client.completions.create(**options, stream=True):
        logprobs = chunk.choices[0].logprobs
        tokens += logprobs.tokens or []
        offsets += logprobs.text_offset or []
    assert whole is not None
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)


async def test_every_sampling_field_arrives(served: Served, http: httpx.AsyncClient) -> None:
    body = {
        "model": "stories",
        "prompt": PROMPT,
        "max_tokens": 9,
        "min_tokens": 2,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"7": 3, "5": -2},
        "allowed_token_ids": [9, 8, 8],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "logprobs": 0,
        "seed": -1,
        "user": "me",
        "priority": -3,
        "cache_salt": "tenant",
        "temperature": 0,
    }
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    ((_, dispatch),) = served.cluster.dispatched
    params = dispatch.request.params
    assert (params.max_tokens, params.min_tokens, params.top_k) == (9, 2, 7)
    assert (params.top_p, params.min_p, params.repetition_penalty) == (0.5, 0.1, 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, -1.0)
    assert params.logit_bias == ((5, -2.0), (7, 3.0))
    assert (params.allowed_token_ids, params.stop_token_ids) == ((8, 9), (4,))
    assert (params.ignore_eos, params.logprobs, params.seed) == (True, 0, 2**64 - 1)
    assert (dispatch.request.priority, dispatch.request.cache_salt) == (-3, "tenant")
    assert params.temperature == 0.0


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ({"type": "content"}, "prediction.content"),
        ({"type": "tool", "content": "x"}, "prediction.type"),
        ({"content": "x"}, "prediction.type"),
        ("x", "prediction"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content"),
    ],
)
async def test_a_prediction_that_is_none_is_refused(
    asgi: httpx.AsyncClient, prediction: object, param: str
) -> None:
    body = {"model": "stories", "messages": [{"role": "user", "content": "Hi"}], "prediction": prediction}
    answer = await asgi.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text


async def test_without_a_seed_each_request_gets_its_own(served: Served, client: openai.AsyncOpenAI) -> None:
    for _ in range(2):
        await client.completions.create(model="stories", prompt=PROMPT)
    one, other = (dispatch.request.params.seed for _, dispatch in served.cluster.dispatched)
    assert one != other


async def test_cached_tokens_are_part_of_usage(served: Served, client: openai.AsyncOpenAI) -> None:
    served.cluster.members["p1"].cached_tokens = 3
    got = await client.completions.create(model="stories", prompt=PROMPT)
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 3


async def test_where_nothing_is_drafted_usage_says_zero(client: openai.AsyncOpenAI) -> None:
    got = await client.completions.create(model="stories", prompt=PROMPT)
    assert got.usage is not None
    details = got.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0


# ── Chat ─────────────────────────────────────────────────────────────────────────────────────────

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Say 你好"}]},
]
IM_END = 151645


@pytest.fixture
async def chat() -> AsyncIterator[tuple[Served, openai.AsyncOpenAI]]:
    cluster = FakeCluster(telling("你好，世界！👩‍👧", QWEN, (IM_END,)))
    pair(cluster)
    async with (
        serving(cluster, "tokenizers/qwen2") as running,
        openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield running, made


async def test_a_chat_goes_through_the_models_template(chat: tuple[Served, openai.AsyncOpenAI]) -> None:
    served, client = chat
    got = await client.chat.completions.create(
        model="stories", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "你好，世界！👩‍👧"
    assert choice.finish_reason == "stop"
    ((_, dispatch),) = served.cluster.dispatched
    assert QWEN.decode(dispatch.request.token_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSay 你好<|im_end|>\n<|im_start|>assistant\n"
    )
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    joined = b"".join(bytes(entry.bytes or []) for entry in content)
    assert joined.decode() == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)


async def test_a_streamed_chat(chat: tuple[Served, openai.AsyncOpenAI]) -> None:
    _, client = chat
    stream = await client.chat.completions.create(
        model="stories", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "你好，世界！👩‍👧"
        assert [choice.finish_reason for choice in mine].count("stop") == 1
        assert mine[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * len(
        telling("你好，世界！👩‍👧", QWEN, (IM_END,))(None, 0)
    )


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text"])
async def test_drafts_that_were_right_and_others_are_part_of_usage(
    chat: tuple[Served, openai.AsyncOpenAI], kind: str, streamed: bool, n: int
) -> None:
    served, client = chat
    served.cluster.batch, served.cluster.drafted = 3, 4
    asked: dict[str, Any] = {"model": "stories", "n": n, "max_tokens": 8, "stream": streamed}
    if streamed:
        asked["stream_options"] = {"include_usage": True}
    if kind == "chat":
        answer: Any = await client.chat.completions.create(messages=MESSAGES, **asked)
    else:
        answer = await client.completions.create(prompt=PROMPT, **asked)
    usage = [chunk.usage async for chunk in answer][-1] if streamed else answer.usage
    details = usage.completion_tokens_details
    assert usage.completion_tokens == 8 * n, "3 by the prefill node, 2 of 4 drafts and one, 1 of 1 and one"
    assert details.accepted_prediction_tokens == (2 + 1) * n
    assert details.rejected_prediction_tokens == 2 * n
    assert (details.reasoning_tokens, details.audio_tokens) == (0, 0)


async def test_a_chat_may_fill_the_context_by_default(chat: tuple[Served, openai.AsyncOpenAI]) -> None:
    served, client = chat
    served.cluster.add("u", max_model_len=32768, total_blocks=4096)
    for name in ("p1", "d1"):
        served.cluster.members.pop(name)
    await client.chat.completions.create(model="stories", messages=MESSAGES)
    ((_, dispatch),) = served.cluster.dispatched
    assert dispatch.request.params.max_tokens == 32768 - len(dispatch.request.token_ids)


async def test_a_model_without_a_template_says_so(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json={"model": "stories", "messages": MESSAGES})
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


async def test_what_is_not_built_yet_says_so(chat: tuple[Served, openai.AsyncOpenAI]) -> None:
    served, client = chat
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported"):
        await client.chat.completions.create(model="stories", messages=MESSAGES, reasoning_effort="low")
    with pytest.raises(openai.BadRequestError, match="tools is not supported yet"):
        await client.chat.completions.create(
            model="stories",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert served.cluster.dispatched == []


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────

GOOD: dict[str, Any] = {"model": "stories", "prompt": PROMPT}
NAN = float("nan")


@pytest.fixture
async def asgi() -> AsyncIterator[httpx.AsyncClient]:
    """Without a socket, for what never gets as far as a node."""
    cluster = FakeCluster()
    cluster.add("u1")
    service = make_service(cluster)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as made:
        yield made
    service.intake.close()
    assert cluster.dispatched == []


@pytest.fixture
async def chat_asgi() -> AsyncIterator[httpx.AsyncClient]:
    """The same, for a model that has a chat template."""
    cluster = FakeCluster()
    cluster.add("u1")
    service = make_service(cluster, "tokenizers/qwen2")
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as made:
        yield made
    service.intake.close()
    assert cluster.dispatched == []


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ["a", ""]}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt"),
        ({"prompt": [512]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [2**80]}, 400, "prompt"),
        ({"prompt": "long " * 600}, 400, "prompt"),
        ({"prompt": ["a"] * 65}, 400, "prompt"),
        ({"max_tokens": 512}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"min_tokens": 17}, 400, "min_tokens"),
        ({"temperature": NAN}, 400, "temperature"),
        ({"temperature": math.inf}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"min_p": 2}, 400, "min_p"),
        ({"top_k": -2}, 400, "top_k"),
        ({"n": 0}, 400, "n"),
        ({"n": 17}, 400, "n"),
        ({"seed": 2**64}, 400, "seed"),
        ({"seed": "x"}, 400, "seed"),
        ({"stop": 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"logprobs": 1, "echo": True}, 400, "echo"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"600": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"6": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"6": NAN}}, 400, "logit_bias"),
        ({"stop_token_ids": [512]}, 400, "stop_token_ids"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
        ({"best_of": 3}, 400, "best_of"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"priority": 2**40}, 400, "priority"),
        ({"cache_salt": "x" * 300}, 400, "cache_salt"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": 5}, 400, "model"),
    ],
)
async def test_bad_input_names_the_field_and_enqueues_nothing(
    asgi: httpx.AsyncClient, change: dict[str, Any], status: int, param: str
) -> None:
    for stream in (False, True):
        if stream and change.keys() == {"stream_options"}:
            continue  # that is no error in a stream
        body = json.dumps({**GOOD, "stream": stream, **change})
        answer = await asgi.post("/v1/completions", content=body, headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), error
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 10_000,
        b'{"prompt": "a"} x',
        b"\xff\xfe{\x00}\x00",
    ],
)
async def test_what_is_not_json_is_a_bad_request(asgi: httpx.AsyncClient, body: bytes) -> None:
    answer = await asgi.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_bad_chats_name_the_field(
    chat_asgi: httpx.AsyncClient, change: dict[str, Any], param: str
) -> None:
    body = {"model": "stories", "messages": MESSAGES, **change}
    answer = await chat_asgi.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error


async def test_a_body_over_the_limit_is_refused_declared_or_not() -> None:
    cluster = FakeCluster()
    cluster.add("u1")

    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    limits = ServiceLimits(max_body_bytes=1000)
    async with (
        serving(cluster, service_limits=limits) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        declared = await http.post("/v1/completions", content=b" " * 1001, headers=JSON)
        chunked = await http.post("/v1/completions", content=unannounced(), headers=JSON)
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert declared.json()["error"]["code"] == "body_too_large"


async def test_a_prompt_that_fits_no_pool_is_refused_at_once() -> None:
    cluster = FakeCluster()
    cluster.add("u1", total_blocks=2)
    async with serving(cluster) as served, httpx.AsyncClient(base_url=served.url) as http:
        answer = await http.post("/v1/completions", json={**GOOD, "max_tokens": 100})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "never_fits")
    assert cluster.dispatched == []


async def test_unknown_paths_and_methods_have_the_same_shape(http: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        answer = await http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


# ── Trouble ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 4])
async def test_a_client_that_goes_frees_everything(
    served: Served, http: httpx.AsyncClient, stream: bool, at: int
) -> None:
    for node in served.cluster.members.values():
        node.hold_at = at
    body = {**GOOD, "max_tokens": 200, "stream": stream}
    asking = asyncio.create_task(http.post("/v1/completions", json=body))
    await until(lambda: served.cluster.running == 1)
    await until(lambda: len(served.cluster.acks) >= min(at, 1))
    asking.cancel()
    await until(lambda: served.dispatcher.num_open == 0)
    await until(lambda: served.cluster.running == 0)
    await until(lambda: served.cluster.ended)
    assert [state for state, _, _ in served.cluster.ended.values()] == ["cancelled"]


async def test_a_client_that_goes_frees_all_of_its_prompts(served: Served, http: httpx.AsyncClient) -> None:
    for node in served.cluster.members.values():
        node.hold_at = 2
    body = {"model": "stories", "prompt": [PROMPT] * 5, "max_tokens": 200, "n": 2}
    asking = asyncio.create_task(http.post("/v1/completions", json=body))
    await until(lambda: served.cluster.running == 10)
    asking.cancel()
    await until(lambda: served.dispatcher.num_open == 0)
    await until(lambda: served.cluster.running == 0)


async def test_a_stream_survives_the_death_of_its_node(served: Served, client: openai.AsyncOpenAI) -> None:
    served.cluster.members["d1"].hold_at = 7
    stream = await client.completions.create(model="stories", prompt=PROMPT, max_tokens=200, stream=True)
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].text
        if "d1" in served.cluster.members and len(text) > 3:
            served.cluster.add("u2")
            served.cluster.kill("d1")
    assert text == TEXT
    assert len(served.cluster.dispatched) == 2


async def test_overload_is_429_with_retry_after() -> None:
    cluster = FakeCluster()
    cluster.add("u1").hold_at = 0
    limits = DispatchLimits(max_open=1)
    async with serving(cluster, limits=limits) as served, httpx.AsyncClient(base_url=served.url) as http:
        first = asyncio.create_task(http.post("/v1/completions", json=GOOD))
        await until(lambda: served.dispatcher.num_open == 1)
        for stream in (False, True):
            answer = await http.post("/v1/completions", json={**GOOD, "stream": stream})
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
        cluster.release()
        assert (await first).status_code == 200


async def test_no_node_is_503(served: Served, http: httpx.AsyncClient) -> None:
    cluster = FakeCluster()
    async with (
        serving(cluster, limits=DispatchLimits(placement_timeout_s=0.05)) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        for stream in (False, True):
            answer = await http.post("/v1/completions", json={**GOOD, "stream": stream})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "service_unavailable"


async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(
    served: Served, client: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    def fail_in_time() -> None:
        ((_, dispatch),) = served.cluster.dispatched
        served.cluster.deliver("d1", Failed("d1", dispatch.request.id, 1, 0, "never_fits", "no room", False))

    served.cluster.members["d1"].hold_at = 3
    stream = await client.completions.create(model="stories", prompt=PROMPT, max_tokens=200, stream=True)
    with pytest.raises(openai.APIError, match="no room"):  # noqa: PT012
        async for _ in stream:
            fail_in_time()


async def test_redis_away_is_503(served: Served, http: httpx.AsyncClient) -> None:
    served.cluster.store_error = ServiceUnavailable("Redis is away")
    answer = await http.post("/v1/completions", json=GOOD)
    served.cluster.store_error = None
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "Redis is away")


async def test_a_bug_of_ours_is_a_500_without_its_details(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(dispatch: Dispatch, node: str) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served.cluster, "accept", broken)
    async with httpx.AsyncClient(base_url=served.url) as http:
        answer = await http.post("/v1/completions", json=GOOD)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


# ── The rest ─────────────────────────────────────────────────────────────────────────────────────


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["stories"]
    assert (await client.models.retrieve("stories")).id == "stories"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


async def test_tokenize_and_detokenize(http: httpx.AsyncClient) -> None:
    there = (await http.post("/tokenize", json={"model": "stories", "prompt": PROMPT})).json()
    assert there["tokens"] == STORIES.encode_now(PROMPT)
    assert (there["count"], there["max_model_len"]) == (len(there["tokens"]), 512)
    body = {"model": "stories", "tokens": there["tokens"], "skip_special_tokens": True}
    assert (await http.post("/detokenize", json=body)).json() == {"prompt": PROMPT}
    for path, bad in (("/tokenize", {}), ("/detokenize", {"tokens": [9999]})):
        assert (await http.post(path, json=bad)).status_code == 400


async def test_readiness_follows_the_nodes_and_the_drain(served: Served, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 200
    served.cluster.kill("d1")
    answer = await http.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert (await http.get("/health")).status_code == 200
    served.cluster.add("u1")
    assert (await http.get("/ready")).status_code == 200
    served.service.draining = True
    assert (await http.get("/ready")).json()["reason"] == "draining"
    assert (await http.post("/v1/completions", json=GOOD)).status_code == 503


async def test_metrics_count_what_happened(http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={**GOOD, "max_tokens": 5})
    await http.post("/v1/completions", json={**GOOD, "max_tokens": 0})
    lines = (await http.get("/metrics")).text.splitlines()
    assert "pdq_gateway_generated_tokens_total 5.0" in lines
    assert "pdq_gateway_open_requests 0.0" in lines
    for status in (200, 400):
        name = f'pdq_gateway_responses_total{{path="/v1/completions",status="{status}"}}'
        assert f"{name} 1.0" in lines


def test_the_gateway_process_never_sees_torch() -> None:
    """Import everything of the gateway, load a tokenizer with a template, and look."""
    program = """
import sys, importlib, pkgutil, pathlib
import gateway
for module in pkgutil.iter_modules(gateway.__path__):
    if module.name != "__main__":
        importlib.import_module(f"gateway.{module.name}")
from common.model_folder.description import describe_model
from gateway.tokenizer import Tokenizer
tokenizer = Tokenizer(describe_model(pathlib.Path(sys.argv[1])))
tokenizer.chat_template.render([{"role": "user", "content": "x"}])
heavy = {"torch", "transformers", "numpy", "numba", "safetensors"}
found = sorted(heavy & {name.partition(".")[0] for name in sys.modules})
assert not found, found
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(MODELS / "tokenizers" / "qwen2")],
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
