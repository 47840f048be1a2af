"""The bodies that clients send, field by field, and how they become validated requests.

Owns: OpenAI's field names and those that vLLM's users know, their types, which of them change
nothing here, which are not built yet, and the conversion to `SamplingParams`. Nothing is coerced:
"0.5" is not a number. Null means that a field is not given. Everything wrong is an
`InvalidRequest` that names the field; a field that nobody knows is named by `unknown_fields`.
"""

from gateway.schemas.chat import ChatBody, ConversationFields
from gateway.schemas.completion import CompletionBody
from gateway.schemas.fields import Fields, parse, unknown_fields
from gateway.schemas.generation import Body, StreamOptions, TextOptions
from gateway.schemas.prompts import check_ids
from gateway.schemas.tokens import DetokenizeBody, TokenizeBody

__all__ = [
    "Body",
    "ChatBody",
    "CompletionBody",
    "ConversationFields",
    "DetokenizeBody",
    "Fields",
    "StreamOptions",
    "TextOptions",
    "TokenizeBody",
    "check_ids",
    "parse",
    "unknown_fields",
]
