"""Every field that clients send: null, defaults, what is harmless, not built, or unknown."""

from __future__ import annotations

import json
import typing
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion, CompletionChoice
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionAssistantMessageParam,
    ChatCompletionChunk,
    ChatCompletionContentPartTextParam,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params

from gateway.app import create_app
from gateway.intake import prepare as module
from gateway.intake.pool import Intake
from gateway.intake.prepare import Prepared, Question
from gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.schemas.fields import Fields
from gateway.service import Service, ServiceLimits
from tests.support.fake_cluster import FakeCluster
from tests.support.gateway_server import MODELS, load_tokenizer, make_service

QWEN = load_tokenizer("tokenizers/qwen2")
IM_END = 151645
ANSWER = [*QWEN.encode_now("Hello there.", add_special_tokens=False), IM_END]
COMPLETION = {"model": "stories", "prompt": "Hi", "max_tokens": 8}
CHAT = {"model": "stories", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
BODIES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": ANSWER},
}

VLLM = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "best_of",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "ec_transfer_params",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "logprob_token_ids",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "mm_processor_kwargs",
    "priority",
    "prompt_embeds",
    "prompt_logprobs",
    "repetition_detection",
    "repetition_penalty",
    "request_id",
    "response_format",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "session_id",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "stream_interval",
    "structured_outputs",
    "suffix",
    "thinking_token_budget",
    "top_k",
    "truncate_prompt_tokens",
    "truncation_side",
    "use_beam_search",
    "vllm_xargs",
]


def official(kind: Any) -> list[str]:
    return sorted(typing.get_type_hints(kind))


TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}
{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def model_folder(folder: Path, max_model_len: int = 32768) -> str:
    """Qwen2's tokenizer, with a template that knows calls."""
    for file in (MODELS / "tokenizers" / "qwen2").iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {"vocab_size": 151936, "max_position_embeddings": max_model_len}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": IM_END}))
    return str(folder)


services: list[Service] = []


@pytest.fixture(autouse=True)
async def _no_process_stays() -> AsyncIterator[None]:
    yield
    while services:
        services.pop().intake.close()


async def http_for(
    limits: ServiceLimits | None = None, model: str = "tokenizers/qwen2"
) -> tuple[FakeCluster, httpx.AsyncClient]:
    cluster = FakeCluster(lambda dispatch, choice: ANSWER)
    cluster.add("u1", max_model_len=32768, total_blocks=4096)
    service = make_service(cluster, model, service_limits=limits or ServiceLimits())
    services.append(service)
    transport = httpx.ASGITransport(create_app(service))
    return cluster, httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("short_model"), 40)


@pytest.fixture
async def http(model: str) -> AsyncIterator[httpx.AsyncClient]:
    _, client = await http_for(model=model)
    async with client:
        yield client


async def post(http: httpx.AsyncClient, path: str, **change: Any) -> httpx.Response:
    return await http.post(path, json={**BODIES[path], **change})


def paths_and_fields() -> Iterator[tuple[str, str]]:
    for name in {*official(completion_params.CompletionCreateParamsNonStreaming), *VLLM}:
        yield "/v1/completions", name
    for name in {*official(chat_params.CompletionCreateParamsNonStreaming), *VLLM}:
        yield "/v1/chat/completions", name


async def test_null_is_not_given_whatever_the_field(http: httpx.AsyncClient) -> None:
    for path, name in sorted(paths_and_fields()):
        if name in ("prompt", "messages"):
            continue
        answer = await post(http, path, **{name: None})
        assert answer.status_code == 200, (path, name, answer.text)
        assert "x-pdq-ignored-fields" not in answer.headers, (path, name)
    for path, kind in (("/tokenize", TokenizeBody), ("/detokenize", DetokenizeBody)):
        for name in kind.model_fields.keys() - {"prompt", "tokens"}:
            assert (await post(http, path, **{name: None})).status_code == 200, (path, name)


async def test_every_field_of_the_official_client_and_of_vllm_is_known(http: httpx.AsyncClient) -> None:
    """No field of theirs may be taken for a stranger, whatever is in it."""
    for path, name in sorted(paths_and_fields()):
        if path == "/v1/completions" and name in ChatBody.model_fields.keys() | ChatBody.not_built:
            continue  # of chats only
        if path == "/v1/chat/completions" and name in ("best_of", "suffix", "prompt_embeds"):
            continue
        answer = await post(http, path, **{name: "😀?"})
        assert answer.status_code in (200, 400, 404), (path, name, answer.text)
        assert "x-pdq-ignored-fields" not in answer.headers, (path, name)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] == name, answer.text


@pytest.mark.parametrize(
    "change",
    [
        {"functions": None, "n": None, "tools": [], "tool_choice": "none", "function_call": "auto"},
        {"n": 1, "stop": [], "logit_bias": {}, "logprobs": False, "top_logprobs": 0},
        {"modalities": ["text"], "audio": None, "response_format": {"type": "text"}},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me"},
        {"parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s"},
        {"verbosity": "low", "prompt_cache_retention": "24h", "tool_choice": "auto"},
        {"stream_options": None, "stream": False, "seed": None, "stop": None},
        {"stream_options": {"include_usage": False}},
        {"use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "guided_json": None},
        {"include_reasoning": True, "echo": False, "structured_outputs": {}, "vllm_xargs": {}},
        {"response_format": {"type": "text", "json_schema": None}, "audio": {"voice": None}},
        {"thinking_token_budget": -1, "stop_token_ids": [], "tools": None, "documents": []},
    ],
)
async def test_what_asks_for_nothing_is_taken(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    answer = await post(http, "/v1/chat/completions", **change)
    assert answer.status_code == 200, answer.text
    assert "x-pdq-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"guided_json": {"type": "object"}}, "guided_json"),
        ("/v1/chat/completions", {"guided_json": {}}, "guided_json"),  # any JSON value
        ("/v1/completions", {"json_schema": {}}, "json_schema"),
        ("/v1/chat/completions", {"web_search_options": {}}, "web_search_options"),  # with defaults
        ("/v1/chat/completions", {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("/v1/chat/completions", {"prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/chat/completions", {"chat_template": "{{ 1 }}"}, "chat_template"),
        ("/v1/completions", {"suffix": "x"}, "suffix"),
        ("/v1/completions", {"regex": "x"}, "regex"),
        ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/completions", {"bad_words": ["x"]}, "bad_words"),
        ("/tokenize", {"tools": [{}]}, "tools"),
    ],
)
async def test_what_is_not_built_says_so(
    http: httpx.AsyncClient, path: str, change: dict[str, Any], param: str
) -> None:
    error = (await post(http, path, **change)).json()["error"]
    assert (error["message"], error["param"]) == (f"{param} is not supported yet", param)


@pytest.mark.parametrize("content", ["Hello there.", [{"type": "text", "text": "Hello"}, " there."]])
async def test_what_the_client_predicts_arrives_as_tokens(model: str, content: object) -> None:
    cluster, http = await http_for(model=model)
    prediction = {"type": "content", "content": content}
    async with http:
        answer = await post(http, "/v1/chat/completions", prediction=prediction, speculative=False)
    assert answer.status_code == 200, answer.text
    assert "x-pdq-ignored-fields" not in answer.headers
    ((_, dispatch),) = cluster.dispatched
    assert dispatch.request.prediction == tuple(ANSWER[:-1])
    assert dispatch.request.speculative is False


async def test_of_a_prediction_no_more_is_kept_than_a_reply_can_have(short_model: str) -> None:
    cluster, http = await http_for(model=short_model)
    prediction = {"type": "content", "content": "a b " * 10_000}
    async with http:
        assert (await post(http, "/v1/chat/completions", prediction=prediction)).status_code == 200
    ((_, dispatch),) = cluster.dispatched
    assert len(dispatch.request.prediction) == 40


UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"temprature": 1}, "temprature"),
    ("/tokenize", {"mood": 1}, "mood"),
    ("/detokenize", {"mood": 1}, "mood"),
    ("/v1/chat/completions", {"prompt": "x", "mood": None}, "prompt"),
    ("/v1/chat/completions", {"stream": True, "stream_options": {"u": 1}}, "stream_options.u"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "m": 1}]}, "messages.0.m"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "m": 1}]}]},
        "messages.0.content.0.m",
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "m": 1}}
                    ],
                }
            ]
        },
        "messages.0.tool_calls.0.function.m",
    ),
    (
        "/v1/chat/completions",
        {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs.enable_thinking",
    ),
    (
        "/tokenize",
        {"prompt": None, "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"mood": 1}},
        "chat_template_kwargs.mood",
    ),
]


@pytest.mark.parametrize(("path", "change", "name"), UNKNOWN)
async def test_a_field_that_nobody_knows_is_ignored_and_seen(
    http: httpx.AsyncClient, path: str, change: dict[str, Any], name: str
) -> None:
    answer = await post(http, path, **change)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-pdq-ignored-fields"] == name
    metrics = (await http.get("/metrics")).text
    assert f'pdq_gateway_ignored_fields_total{{path="{path}"}} 1.0' in metrics


@pytest.mark.parametrize(("path", "change", "name"), UNKNOWN)
async def test_it_is_refused_where_the_gateway_is_told_to(
    path: str, change: dict[str, Any], name: str
) -> None:
    cluster, http = await http_for(ServiceLimits(unknown_fields="refuse"))
    error = (await post(http, path, **change)).json()["error"]
    assert (error["message"], error["param"]) == (f"unknown field {name}", name)
    assert cluster.dispatched == []


async def test_a_hostile_name_does_no_harm_in_the_header(http: httpx.AsyncClient) -> None:
    names = {"a\r\nx-evil: 1": 1, "": 2, "é" * 500: 3, **{f"f{i}": 1 for i in range(1000)}}
    answer = await post(http, "/v1/completions", **names)
    assert answer.status_code == 200
    assert "x-evil" not in answer.headers
    assert len(answer.headers["x-pdq-ignored-fields"]) < 1000


async def test_ignored_fields_are_logged_once_a_minute(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        await post(http, "/v1/completions", mood=1)
    assert [record.message for record in caplog.records].count("fields.ignored") == 1


async def test_every_field_that_is_taken_is_read(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No field may be declared and then do nothing: each is looked at while requests run."""
    read: set[tuple[str, str]] = set()
    parsing = 0
    original = Fields.__getattribute__

    def noted(self: Fields, name: str) -> Any:
        if not parsing and name in type(self).model_fields:
            read.update((kind.__name__, name) for kind in type(self).__mro__)
        return original(self, name)

    def parse(kind: type[Fields], data: bytes) -> Fields:
        nonlocal parsing
        parsing += 1
        try:
            return original_parse(kind, data)
        finally:
            parsing -= 1

    def unknown(body: Fields) -> Iterator[str]:
        return iter(())

    async def in_this_process(self: Intake, client: str, question: Question, body: bytes) -> Prepared:
        return module.prepare(self._models, question, body)

    original_parse = module.parse
    for place in ("gateway.intake.prepare", "gateway.completions", "gateway.chat"):
        monkeypatch.setattr(f"{place}.parse", parse)
    monkeypatch.setattr("gateway.intake.prepare.unknown_fields", unknown)
    monkeypatch.setattr(Intake, "prepare", in_this_process)
    monkeypatch.setattr(Fields, "__getattribute__", noted)
    history = [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "x"},
    ]
    for stream in (False, True):
        options = {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
        for more in ({"logprobs": 1}, {"echo": True}, {"truncate_prompt_tokens": -1}):
            answer = await post(http, "/v1/completions", **options, **more)
            assert answer.status_code == 200, answer.text
        answer = await post(
            http,
            "/v1/chat/completions",
            messages=history,
            prediction={"type": "content", "content": "x"},
            logprobs=True,
            truncate_prompt_tokens=-1,
            **options,
        )
        assert answer.status_code == 200, answer.text
    await post(http, "/tokenize")
    await post(http, "/tokenize", prompt=None, messages=history)
    await post(http, "/detokenize")
    for kind in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, *nested(ChatBody)):
        unread = {name for name in kind.model_fields if (kind.__name__, name) not in read}
        assert not unread, (kind, unread)


def nested(kind: type[Fields]) -> Iterator[type[Fields]]:
    for field in kind.model_fields.values():
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            pending += typing.get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, Fields):
                yield annotation
                yield from nested(annotation)


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_dumped_by_the_official_client_goes_back_in_as_history(
    http: httpx.AsyncClient,
) -> None:
    first = ChatCompletion.model_validate((await post(http, "/v1/chat/completions")).json())
    message = first.choices[0].message
    calling = ChatCompletionMessage.model_validate(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        }
    )
    for dumped in (
        message.model_dump(),
        message.model_dump(exclude_none=True),
        json.loads(message.model_dump_json()),
        message.to_dict(),
    ):
        history = [*CHAT["messages"], dumped, {"role": "user", "content": "And?"}]
        answer = await post(http, "/v1/chat/completions", messages=history)
        assert answer.status_code == 200, answer.text
        assert "x-pdq-ignored-fields" not in answer.headers
    tool = {"role": "tool", "tool_call_id": "c", "content": "5"}
    history = [*CHAT["messages"], calling.model_dump(), tool]
    answer = await post(http, "/v1/chat/completions", messages=history)
    assert answer.status_code == 200, answer.text
    assert "x-pdq-ignored-fields" not in answer.headers


async def test_null_is_not_given_inside_messages_parts_and_calls(http: httpx.AsyncClient) -> None:
    def nulls(kind: Any, **known: Any) -> dict[str, Any]:
        return {**dict.fromkeys(official(kind)), **known}

    call = nulls(
        ChatCompletionMessageFunctionToolCallParam,
        id="c",
        type="function",
        function={"name": "f", "arguments": "{}"},
    )
    part = nulls(ChatCompletionContentPartTextParam, type="text", text="x")
    history = [
        nulls(ChatCompletionUserMessageParam, role="user", content=[part]),
        nulls(ChatCompletionAssistantMessageParam, role="assistant", tool_calls=[call]),
        nulls(ChatCompletionToolMessageParam, role="tool", content="5", tool_call_id="c"),
        nulls(ChatCompletionAssistantMessageParam, role="assistant", content="x", tool_calls=[]),
        nulls(ChatCompletionUserMessageParam, role="user", content="x"),
    ]
    options = nulls(ChatCompletionStreamOptionsParam, continuous_usage_stats=None)
    answer = await post(http, "/v1/chat/completions", messages=history, stream=True, stream_options=options)
    assert answer.status_code == 200, answer.text
    assert "x-pdq-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    ("part", "param", "problem"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "type", "image_url are not supported"),
        ({"type": "input_audio", "input_audio": {}}, "type", "input_audio are not supported"),
        ({"type": "file", "file": {}}, "type", "file are not supported"),
        ({"type": "telepathy", "text": "x"}, "type", "telepathy are unknown"),
        ({"type": "text"}, "text", "missing"),
        ({"type": "text", "text": 5}, "text", "string"),
        ({"type": "refusal", "text": "x"}, "refusal", "missing"),
        ({"type": 5}, "type", "string"),
        (5, "", ""),
    ],
)
async def test_a_part_that_is_no_text_is_refused_by_name(
    http: httpx.AsyncClient, part: Any, param: str, problem: str
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    answer = await post(http, "/v1/chat/completions", messages=messages)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == f"messages.0.content.1.{param}".removesuffix(".")
    assert problem in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"function_call": {"name": "f", "arguments": ""}}, "function_call"),
        ({"audio": {"id": "x"}}, "audio"),
        ({"tool_calls": [{"id": "c", "type": "custom", "custom": {}}]}, "tool_calls.0.type"),
        ({"tool_calls": [{"id": "c", "type": "function"}]}, "tool_calls.0.function"),
        ({"tool_calls": [{"function": {"name": ""}}]}, "tool_calls.0.function.name"),
        ({"tool_calls": {}}, "tool_calls"),
        ({"name": 5}, "name"),
    ],
)
async def test_what_a_message_cannot_have_is_named(
    http: httpx.AsyncClient, message: dict[str, Any], param: str
) -> None:
    messages = [{"role": "assistant", "content": "x", **message}]
    answer = await post(http, "/v1/chat/completions", messages=messages)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"messages.0.{param}"


@pytest.mark.parametrize("content", ["Of course.", [{"type": "text", "text": "Of course."}]])
async def test_a_refusal_beside_an_answer_is_not_lost(model: str, content: Any) -> None:
    cluster, http = await http_for(model=model)
    message = {"role": "assistant", "content": content, "refusal": "Not that."}
    async with http:
        answer = await post(http, "/v1/chat/completions", messages=[message])
    assert answer.status_code == 200, answer.text
    prompt = QWEN.decode(cluster.dispatched[0][1].request.token_ids)
    assert "Of course.\nNot that." in prompt


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "continue_final_message"])
async def test_what_is_a_field_of_its_own_is_not_taken_as_a_variable_of_the_template(
    http: httpx.AsyncClient, name: str
) -> None:
    answer = await post(http, "/v1/chat/completions", chat_template_kwargs={name: False})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


async def test_a_token_id_that_is_written_in_two_ways_has_no_two_biases(http: httpx.AsyncClient) -> None:
    answer = await post(http, "/v1/completions", logit_bias={"7": 1, "007": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


async def test_half_of_a_surrogate_pair_is_named_as_what_it_is(http: httpx.AsyncClient) -> None:
    body = b'{"model": "stories", "prompt": "cut in two: \\ud83d"}'
    json_type = {"content-type": "application/json"}
    answer = await http.post("/v1/completions", content=body, headers=json_type)
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def official_fields(kind: Any) -> set[str]:
    return {name for name, field in kind.model_fields.items() if field.is_required()}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_answers_have_what_the_official_clients_models_require(http: httpx.AsyncClient) -> None:
    for more in ({}, {"logprobs": 2}):
        Completion.model_validate((await post(http, "/v1/completions", **more)).json())
        for event in events(await post(http, "/v1/completions", stream=True, **more)):
            assert event["choices"][0].keys() >= official_fields(CompletionChoice)
            assert event.keys() >= official_fields(Completion)
    for more in ({}, {"logprobs": True, "top_logprobs": 2}):
        answer = (await post(http, "/v1/chat/completions", **more)).json()
        assert ChatCompletion.model_validate(answer).choices[0].message.content == "Hello there."
        for event in events(await post(http, "/v1/chat/completions", stream=True, **more)):
            ChatCompletionChunk.model_validate(event)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_continuous_usage_counts_up_with_every_chunk(http: httpx.AsyncClient, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await post(http, path, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == len(ANSWER)
    assert chunks[-1]["choices"] == []
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks[:-1]} == {
        chunks[-1]["usage"]["prompt_tokens"]
    }


async def test_token_ids_are_all_of_the_prompt_and_of_the_answer(http: httpx.AsyncClient) -> None:
    prompt_ids = QWEN.encode_now("Hi")
    options = {"return_token_ids": True, "n": 2}
    whole = (await post(http, "/v1/completions", **options)).json()
    for choice in whole["choices"]:
        assert (choice["token_ids"], choice["prompt_token_ids"]) == (ANSWER, prompt_ids)
    assert whole["usage"]["completion_tokens"] == 2 * len(ANSWER)
    chunks = events(await post(http, "/v1/completions", stream=True, **options))
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [i for choice in mine for i in choice["token_ids"]] == ANSWER
        assert [choice["prompt_token_ids"] for choice in mine if choice["prompt_token_ids"]] == [prompt_ids]

    rendered = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()["tokens"]
    chat = (await post(http, "/v1/chat/completions", **options)).json()
    assert [choice["token_ids"] for choice in chat["choices"]] == [ANSWER, ANSWER]
    assert chat["prompt_token_ids"] == rendered
    chunks = events(await post(http, "/v1/chat/completions", stream=True, **options))
    assert chunks[0]["prompt_token_ids"] == rendered
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [i for choice in mine for i in choice["token_ids"]] == ANSWER


async def test_tokens_are_named_by_their_ids_where_asked(http: httpx.AsyncClient) -> None:
    options = {"return_tokens_as_token_ids": True}
    got = (await post(http, "/v1/completions", logprobs=1, **options)).json()
    names = [f"token_id:{token_id}" for token_id in ANSWER[:-1]]
    logprobs = got["choices"][0]["logprobs"]
    assert logprobs["tokens"] == names
    assert names[0] in logprobs["top_logprobs"][0]
    got = (await post(http, "/v1/chat/completions", logprobs=True, **options)).json()
    assert [entry["token"] for entry in got["choices"][0]["logprobs"]["content"]] == names


async def test_what_stopped_an_answer_is_shown_where_asked(http: httpx.AsyncClient) -> None:
    async def text(**options: Any) -> str:
        got = (await post(http, "/v1/completions", **options)).json()
        streamed = events(await post(http, "/v1/completions", stream=True, **options))
        assert "".join(c["choices"][0]["text"] for c in streamed) == got["choices"][0]["text"]
        return str(got["choices"][0]["text"])

    assert await text(stop="lo t") == "Hel"
    assert await text(stop="lo t", include_stop_str_in_output=True) == "Hello t"
    assert await text(skip_special_tokens=False) == "Hello there."
    assert await text(include_stop_str_in_output=True) == "Hello there."
    assert await text(include_stop_str_in_output=True, skip_special_tokens=False) == "Hello there.<|im_end|>"


async def test_a_prompt_is_cut_to_what_is_asked_or_fits(short_model: str) -> None:
    cluster, http = await http_for(model=short_model)
    ids = list(range(100, 200))

    async def prompt(**options: Any) -> tuple[int, ...]:
        cluster.dispatched.clear()
        answer = await post(http, "/v1/completions", prompt=ids, **options)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == len(cluster.dispatched[0][1].request.token_ids)
        return cluster.dispatched[0][1].request.token_ids

    assert await prompt(truncate_prompt_tokens=5) == tuple(ids[-5:])
    assert await prompt(truncate_prompt_tokens=5, truncation_side="right") == tuple(ids[:5])
    assert await prompt(truncate_prompt_tokens=-1) == tuple(ids[-32:])
    assert await prompt(truncate_prompt_tokens=-1, max_tokens=None) == tuple(ids[-39:])
    for bad in (0, -2, 50):
        answer = await post(http, "/v1/completions", prompt=ids, truncate_prompt_tokens=bad)
        assert answer.status_code == 400


@pytest.mark.parametrize("tail", ["", "\N{CUNEIFORM SIGN A}"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_ends_inside_a_character_is_not_billed_to_the_completion(
    tail: str, stream: bool
) -> None:
    """Echo and text are what all ids are at once; without echo the prompt's part stays away."""
    cluster, http = await http_for()
    character = QWEN.encode_now("a\N{CUNEIFORM SIGN A}", add_special_tokens=False)
    for cut in range(2, len(character)):
        prompt = character[:cut]
        reply = [*(character[cut:] if tail else []), *ANSWER]
        cluster.reply = lambda dispatch, choice, reply=reply: reply
        whole = QWEN.decode([*prompt, *reply])
        for echo in (True, False):
            options = {"prompt": prompt, "echo": echo, "max_tokens": 20, "n": 2}
            if stream:
                chunks = events(await post(http, "/v1/completions", stream=True, **options))
                texts = ["", ""]
                for chunk in chunks:
                    texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
            else:
                got = (await post(http, "/v1/completions", **options)).json()
                texts = [choice["text"] for choice in got["choices"]]
                assert got["usage"]["completion_tokens"] == 2 * len(reply)
            assert texts == [whole if echo else tail + "Hello there."] * 2


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/completions", {"prompt": [5] * 50}, "prompt"),
        ("/v1/completions", {"max_tokens": 40}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": 40}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": None, "max_completion_tokens": 40}, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 50}]}, "messages"),
    ],
)
async def test_what_overflows_the_context_says_what_clients_look_for(
    short_model: str, path: str, change: dict[str, Any], param: str
) -> None:
    _, http = await http_for(model=short_model)
    error = (await post(http, path, **change)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "This model's maximum context length is" in error["message"]
    assert " tokens. However, you" in error["message"]


async def test_nodes_with_a_shorter_context_say_it_in_the_same_words(model: str) -> None:
    cluster, http = await http_for(model=model)
    cluster.members.clear()
    cluster.add("u1", max_model_len=50, total_blocks=4096)
    long = [{"role": "user", "content": "a " * 100}]
    for change, param in (
        ({"messages": long}, "messages"),
        ({"max_tokens": None, "max_completion_tokens": 60}, "max_completion_tokens"),
        ({"max_tokens": 60}, "max_tokens"),
    ):
        error = (await post(http, "/v1/chat/completions", **change)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "This model's maximum context length is 50 tokens. However" in error["message"]
    assert cluster.dispatched == []
