"""The bodies clients send, field by field, and how they become validated requests.

Owns: OpenAI's field names (and the extensions that vLLM's users know), their types, what is not
built yet, and the conversion to `SamplingParams`. Nothing is coerced: "0.5" is not a number.
Everything wrong is an `InvalidRequest` that names the field.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from common.errors import InvalidRequest, TokenOutOfRange
from common.sampling import MAX_LOGPROBS, MAX_SEED, SamplingParams

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_CACHE_SALT = 256
MAX_PRIORITY = 2**31 - 1

Prompts = list["str | list[int]"]
T = TypeVar("T", bound="Body")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class Body(_Strict):
    """Fields of both endpoints. `not_built` names OpenAI's fields we know and refuse."""

    not_built: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    stop: Any = None  # a string or a list of strings
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    max_tokens: int | None = None
    # What vLLM calls the same.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    return_token_ids: bool = False
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    cache_salt: Annotated[str, Field(max_length=MAX_CACHE_SALT)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise InvalidRequest(
                "stop must be a string or a list of strings, not empty", param="stop"
            )
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise InvalidRequest(
                f"stop takes {MAX_STOPS} strings of {MAX_STOP_LENGTH} characters at most",
                param="stop",
            )
        return tuple(stops)

    def check(self, max_n: int) -> None:
        """What concerns several fields; `sampling` and `stops` check the rest."""
        if not 1 <= self.n <= max_n:
            raise InvalidRequest(f"n must be between 1 and {max_n}, got {self.n}", param="n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream only", param="stream_options")

    def _sampling(self, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=_given(self.temperature, 1.0),
            top_k=0 if self.top_k == -1 else _given(self.top_k, 0),
            top_p=_given(self.top_p, 1.0),
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=_logit_bias(self.logit_bias),
            allowed_token_ids=_sorted_ids(self.allowed_token_ids),
            stop_token_ids=_sorted_ids(self.stop_token_ids) or (),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            seed=_seed(self.seed),
        )
        params.check_vocabulary(vocab_size)
        return params


class CompletionBody(Body):
    """`POST /v1/completions`."""

    not_built: ClassVar[frozenset[str]] = frozenset({"suffix", "prompt_embeds", "response_format"})

    prompt: Any  # string, list of strings, token ids, list of token id lists: see `prompts`
    echo: bool = False
    best_of: int | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True

    def check(self, max_n: int) -> None:
        super().check(max_n)
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of is not supported beyond n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs is not supported yet: the prompt's logprobs are not computed",
                param="echo",
            )

    def prompts(self, max_prompts: int, vocab_size: int) -> Prompts:
        return parse_prompts(self.prompt, max_prompts, vocab_size)

    def sampling(self, room: int, vocab_size: int) -> SamplingParams:
        """`room`: positions the context leaves after the prompt; OpenAI's default is 16."""
        wanted = _given(self.max_tokens, max(1, min(16, room)))
        return self._sampling(wanted, self.logprobs, vocab_size)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    not_built: ClassVar[frozenset[str]] = frozenset(
        {
            "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call",
            "modalities", "audio", "prediction", "web_search_options", "reasoning_effort",
            "verbosity", "store", "metadata", "service_tier", "prompt_cache_key",
            "safety_identifier",
        }
    )  # fmt: skip

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self, max_n: int) -> None:
        super().check(max_n)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs only", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs must be between 0 and {MAX_LOGPROBS}", param="top_logprobs"
            )
        for index, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise InvalidRequest(
                    f"messages.{index}.content is missing", param=f"messages.{index}.content"
                )

    def sampling(self, room: int, vocab_size: int) -> SamplingParams:
        """`room`: positions the context leaves after the prompt, the default of max_tokens."""
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ", param="max_completion_tokens"
            )
        wanted = _given(self.max_completion_tokens, self.max_tokens)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(_given(wanted, max(1, room)), logprobs, vocab_size)


class TokenizeBody(_Strict):
    """`POST /tokenize`: a prompt, or messages that go through the chat template."""

    not_built: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # None: for a prompt yes, for messages no
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(_Strict):
    """`POST /detokenize`."""

    not_built: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


AnyBody = TypeVar("AnyBody", CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """The body in `data`; raises `InvalidRequest` naming the first field that is wrong."""
    try:
        return kind.model_validate_json(data)
    except pydantic.ValidationError as error:
        first, *_ = sorted(error.errors(include_url=False), key=_importance)
        raise _as_invalid(first, kind.not_built) from error


def _importance(error: Any) -> int:
    """A field we do not know says more than the one that is missing in its place."""
    return 0 if error["type"] == "extra_forbidden" else 1


def _as_invalid(error: Any, not_built: frozenset[str]) -> InvalidRequest:
    if error["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {error['msg']}")
    # The location of a union ends in the name of the alternative that was tried.
    where = ".".join(
        str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier()
    )
    where = where.removesuffix(".str") or "body"
    if str(error["loc"][:1] and error["loc"][0]) in not_built:
        return InvalidRequest(f"{where} is not supported yet", param=where)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {where}", param=where)
    if error["type"] == "missing":
        return InvalidRequest(f"{where} is missing", param=where)
    return InvalidRequest(f"{where}: {error['msg']}", param=where)


def parse_prompts(value: Any, max_prompts: int, vocab_size: int) -> Prompts:
    """The four forms of `prompt` as a list of strings or token id lists, none of them empty."""
    prompts: list[Any]
    if isinstance(value, list) and value and not _is_id(value[0]):
        prompts = value
    else:
        prompts = [value]
    if len(prompts) > max_prompts:
        raise InvalidRequest(
            f"prompt has {len(prompts)} entries, {max_prompts} are allowed", param="prompt"
        )
    for prompt in prompts:
        if not isinstance(prompt, (str, list)):
            raise InvalidRequest(
                "prompt must be a string, a list of strings, a list of token ids or a list of "
                "lists of token ids",
                param="prompt",
            )
        if not prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        if isinstance(prompt, list):
            check_ids(prompt, vocab_size, "prompt")
    return prompts


def check_ids(ids: list[Any], vocab_size: int, param: str) -> None:
    for token_id in ids:
        if not _is_id(token_id):
            raise InvalidRequest(f"{param}: {token_id!r:.40} is no token id", param=param)
        if not 0 <= token_id < vocab_size:
            raise TokenOutOfRange(
                f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}",
                param=param,
            )


def _is_id(value: Any) -> bool:
    return type(value) is int


V = TypeVar("V")


def _given(value: V | None, default: V) -> V:
    return default if value is None else value


def _seed(seed: int | None) -> int:
    """Any 64-bit integer, signed or not, as an unsigned one; without one, a random one."""
    if seed is None:
        return secrets.randbits(64)
    if not -(2**63) <= seed <= MAX_SEED:
        raise InvalidRequest("seed must be a 64-bit integer", param="seed")
    return seed & MAX_SEED


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    entries = []
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: {key!r:.40} is no token id", param="logit_bias")
        entries.append((int(key), value))
    return tuple(sorted(entries))


def _sorted_ids(ids: list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(sorted(set(ids)))
