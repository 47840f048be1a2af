"""The bodies of `POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from common.errors import InvalidRequest
from gateway.schemas.chat import CONVERSATION_NOT_BUILT, ConversationFields, Messages
from gateway.schemas.fields import Fields


class TokenizeBody(ConversationFields):
    """A prompt, or messages that go through the chat template."""

    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = CONVERSATION_NOT_BUILT

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        self.check_conversation()


class DetokenizeBody(Fields):
    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]
    skip_special_tokens: bool = False
