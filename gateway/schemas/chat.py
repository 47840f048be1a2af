"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from common.errors import InvalidRequest
from common.model_folder.generation import SamplingDefaults
from common.sampling import MAX_LOGPROBS, SamplingParams
from gateway.schemas.fields import Fields, given
from gateway.schemas.generation import Body
from gateway.schemas.messages import ChatMessage, ContentPart

Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


OWN_FIELDS = frozenset({"messages", "add_generation_prompt", "continue_final_message"})


class ConversationFields(Fields):
    """How messages go through the template."""

    add_generation_prompt: bool | None = None  # None: unless the last message is continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = None
    add_special_tokens: bool | None = None  # None: a template writes them itself

    @property
    def opens_an_answer(self) -> bool:
        """Whether the prompt ends in the beginning of an assistant's message."""
        return given(self.add_generation_prompt, not self.continue_final_message)

    @property
    def template_variables(self) -> dict[str, Any]:
        fields = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        given = {name: value for name, value in fields.items() if value}
        return {**(self.chat_template_kwargs or {}), **given}

    def check_conversation(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        for name in OWN_FIELDS & (self.chat_template_kwargs or {}).keys():
            raise InvalidRequest(
                f"chat_template_kwargs: {name} is a field of the body", param="chat_template_kwargs"
            )


CONVERSATION_NOT_BUILT: Mapping[str, tuple[object, ...]] = {
    "tools": (),
    "chat_template": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
}


class Prediction(Fields):
    """What the client expects the reply to be like: drafts are taken from it where a node drafts."""

    type: Literal["content"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        assert self.type == "content"
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class ChatBody(Body, ConversationFields):
    no_effect: ClassVar[frozenset[str]] = Body.no_effect | {"parallel_tool_calls", "verbosity"}
    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Body.not_built,
        **CONVERSATION_NOT_BUILT,
        "tool_choice": ("none", "auto"),  # without tools
        "functions": (),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "include_reasoning": (True,),
        "echo": (False,),
        "return_prompt_text": (False,),
    }

    asks_even_empty: ClassVar[frozenset[str]] = Body.asks_even_empty | {"web_search_options"}

    messages: Messages
    prediction: Prediction | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().wanted_tokens

    def check(self, max_n: int) -> None:
        super().check(max_n)
        self.check_conversation()
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"top_logprobs must be between 0 and {MAX_LOGPROBS}", param="top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs only", param="top_logprobs")

    def sampling(self, room: int, vocab_size: int, defaults: SamplingDefaults) -> SamplingParams:
        """`room`: positions the context leaves after the prompt, the default of max_tokens unless
        the model has its own."""
        _, wanted = self.wanted_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        most = max(1, min(room, defaults.max_tokens or room))
        return self._sampling(given(wanted, most), logprobs, vocab_size, defaults)
