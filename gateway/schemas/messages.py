"""One message of a chat, as clients send it.

Owns: roles, parts of content, tool calls and the several names of reasoning. A message that a model
wrote goes back in as history, dumped by the official client. How a template wants its messages is
not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gateway.schemas.fields import Fields, absent

TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
OTHER_TYPES = frozenset(
    {
        "image_url",
        "input_image",
        "image",
        "image_embeds",
        "input_audio",
        "audio_url",
        "audio",
        "video_url",
        "video",
        "file",
        "input_file",
    }
)


class ContentPart(Fields):
    """Text, in one of OpenAI's spellings. A bare string counts as one, as with vLLM."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: str = "text"
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, given: Any) -> Any:
        return {"type": "text", "text": given} if isinstance(given, str) else given

    @field_validator("type")
    @classmethod
    def _type_is_known(cls, kind: str) -> str:
        if kind in TEXT_TYPES or kind == "refusal":
            return kind
        problem = "not supported yet" if kind in OTHER_TYPES else "unknown"
        raise PydanticCustomError("part", "parts of type {kind} are " + problem, {"kind": kind[:40]})

    @model_validator(mode="after")
    def _has_text(self) -> ContentPart:
        field = "refusal" if self.type == "refusal" else "text"
        if getattr(self, field) is None:
            raise absent(field)
        return self

    @property
    def content(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


class FunctionCall(Fields):
    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] = ""


class ToolCall(Fields):
    no_effect: ClassVar[frozenset[str]] = frozenset({"index"})  # of a call put together from deltas
    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {"custom": ()}

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(lambda given: "<parts>" if isinstance(given, list) else "<text>"),
]


class ChatMessage(Fields):
    no_effect: ClassVar[frozenset[str]] = frozenset({"annotations"})
    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {"audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    refusal: str | None = None
    # One thing under three names: those of vLLM, of DeepSeek and of gpt-oss.
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None

    @model_validator(mode="after")
    def _only_an_assistant_may_be_silent(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise absent("content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as transformers' templates know it. `content` is a string, or a list of text
        parts where the client gave a list, or None where it said nothing."""
        message: dict[str, Any] = {"role": self.role, "content": self._content()}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        names = (self.reasoning, self.reasoning_content, self.thinking)
        reasoning = next((text for text in names if text is not None), None)
        if reasoning is not None:
            message.update(dict.fromkeys(("reasoning", "reasoning_content", "thinking"), reasoning))
        return message

    def _content(self) -> str | list[dict[str, str]] | None:
        if isinstance(self.content, list):
            texts = [part.content for part in self.content]
            if self.refusal:
                texts.append(self.refusal)
            return [{"type": "text", "text": text} for text in texts]
        if self.content and self.refusal:
            return f"{self.content}\n{self.refusal}"
        return self.content or self.refusal or self.content


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    known = {} if call.id is None else {"id": call.id}
    return {**known, "type": call.type, "function": function}
