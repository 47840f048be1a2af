"""What becomes of a body, as one pure function of its bytes: parsed, checked, rendered, tokenized.

Owns: everything about a request whose cost grows with what the client sent. It runs in the gateway
for small bodies and in an intake process for others, with the same result. Knows nothing of HTTP,
processes or the event loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.errors import InvalidRequest
from gateway.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    ConversationFields,
    DetokenizeBody,
    Fields,
    TokenizeBody,
    check_ids,
    parse,
    unknown_fields,
)
from gateway.served_models import ServedModel, ServedModels
from gateway.unknown_fields import shown

KINDS: dict[str, type[Any]] = {
    "completions": CompletionBody,
    "chat": ChatBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
}
MAX_FIELDS_BYTES = 2**18  # of a body without its prompt
MAX_ANSWER_BYTES = 2**25
MAX_UNKNOWN = 10

TokenIds = Sequence[int]


class NeedsProcess(Exception):
    """This body has work that the event loop must not do, however small the body is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is to be made of a body, and within which limits."""

    kind: str  # of `KINDS`
    max_n: int = 16
    max_prompts: int = 64
    max_prompt_tokens: int | None = None
    refuse_unknown: bool = False  # fields that nobody knows are an error
    in_place: bool = False  # on the event loop: no chat template, no pattern that may backtrack
    contexts: Mapping[str, int | None] = dataclasses.field(default_factory=dict)  # by model


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """What the gateway needs of a body. `fields` is the body without its prompt, as JSON; `answer`
    is a whole JSON answer, of the endpoints that need no node."""

    fields: bytes = b"{}"
    prompts: tuple[TokenIds, ...] = ()
    prediction: TokenIds = ()
    echoes: tuple[bytes, ...] = ()  # per prompt the text as JSON that is echoed as it was given
    unknown: tuple[str, ...] = ()  # paths of the first fields that nobody knows
    answer: bytes = b""


def prepare(models: ServedModels, question: Question, data: bytes) -> Prepared:
    """Raises `InvalidRequest` and its kinds for what is wrong with the body in `data`."""
    body = parse(KINDS[question.kind], data)
    model = models.find(body.model)
    names = itertools.chain(unknown_fields(body), _unread_variables(model, body))
    unknown = tuple(name[:200] for name in itertools.islice(names, MAX_UNKNOWN))
    if unknown and question.refuse_unknown:
        name = shown(unknown[0])
        raise InvalidRequest(f"unknown field {name}", param=name)
    match body:
        case CompletionBody():
            body.check(question.max_n)
            body.text_options()
            given = body.prompts(question.max_prompts, model.vocab_size)
            prompts = tuple(_completion_prompt(model, question, body, each) for each in given)
            echoes = tuple(_echo(body, each) for each in given)
            fields = _fields(body, {"prompt": ""})
            return Prepared(fields, prompts, echoes=echoes, unknown=unknown)
        case ChatBody():
            body.check(question.max_n)
            body.text_options()
            ids = _chat_prompt(model, question, body, "messages")
            fields = _fields(body, {"messages": [{"role": "user", "content": ""}]})
            return Prepared(fields, (ids,), _prediction(model, body), unknown=unknown)
        case TokenizeBody():
            return Prepared(unknown=unknown, answer=_tokenized(model, question, body))
        case DetokenizeBody():
            check_ids(body.tokens, model.vocab_size, "tokens")
            skip = body.skip_special_tokens
            text = model.tokenizer.decode(body.tokens, skip_special_tokens=skip)
            return Prepared(unknown=unknown, answer=_answer({"prompt": text}))
    raise AssertionError(question.kind)


def _unread_variables(model: ServedModel, body: Fields) -> Iterator[str]:
    """The path of each variable for the chat template that it does not have."""
    given = body.chat_template_kwargs if isinstance(body, ConversationFields) else None
    for name in given or {}:
        if not model.tokenizer.template_reads(name):
            yield f"chat_template_kwargs.{name}"


def _completion_prompt(
    model: ServedModel, question: Question, body: CompletionBody, given: str | list[int]
) -> TokenIds:
    if isinstance(given, list):
        return _checked(model, question, body, given, "prompt")
    return _encoded(model, question, body, given, "prompt", body.add_special_tokens)


def _echo(body: CompletionBody, given: str | list[int]) -> bytes:
    whole = isinstance(given, str) and body.truncate_prompt_tokens is None
    return _json(given) if body.echo and whole else b""


def _chat_prompt(
    model: ServedModel, question: Question, body: ChatBody | TokenizeBody, param: str
) -> TokenIds:
    """Token ids of the messages. Most templates write special tokens themselves."""
    if question.in_place:
        raise NeedsProcess
    assert body.messages is not None
    prompt = model.tokenizer.chat_template.render(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.opens_an_answer,
        continue_final_message=body.continue_final_message,
        variables=body.template_variables,
    )
    return _encoded(model, question, body, prompt, param, body.add_special_tokens is True)


def _prediction(model: ServedModel, body: ChatBody) -> TokenIds:
    """Token ids of what the reply is expected to be like, no more than a reply can have."""
    if body.prediction is None:
        return ()
    ids = model.tokenizer.encode_now(body.prediction.text, add_special_tokens=False)
    if model.max_model_len is not None:
        del ids[model.max_model_len :]
    return array("I", itertools.takewhile(lambda token: token < model.vocab_size, ids))


def _encoded(
    model: ServedModel,
    question: Question,
    body: Body | TokenizeBody,
    text: str,
    param: str,
    add_special_tokens: bool,
) -> TokenIds:
    if question.in_place and model.tokenizer.may_backtrack:
        raise NeedsProcess
    if isinstance(body, Body) and body.truncate_prompt_tokens is None:
        # What cannot fit is refused before it is encoded.
        least = model.tokenizer.least_tokens(text)
        model.check_length(least, question.max_prompt_tokens, param, at_least=True)
    ids = model.tokenizer.encode_now(text, add_special_tokens=add_special_tokens)
    return _checked(model, question, body, ids, param)


def _checked(
    model: ServedModel, question: Question, body: Body | TokenizeBody, ids: list[int], param: str
) -> TokenIds:
    if isinstance(body, Body) and body.truncate_prompt_tokens is None:
        model.check_length(len(ids), question.max_prompt_tokens, param)
    return array("I", ids)


def _tokenized(model: ServedModel, question: Question, body: TokenizeBody) -> bytes:
    body.check()
    if body.prompt is not None:
        add = body.add_special_tokens is not False
        ids = _encoded(model, question, body, body.prompt, "prompt", add)
    else:
        ids = _chat_prompt(model, question, body, "messages")
    answer: dict[str, object] = {
        "count": len(ids),
        "max_model_len": question.contexts.get(model.name, model.max_model_len),
        "tokens": list(ids),
    }
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.token_text(token_id) for token_id in ids]
    return _answer(answer)


def _fields(body: Body, placeholders: dict[str, object]) -> bytes:
    """The fields that are left when the prompt is token ids; what nobody reads is dropped."""
    wanted = set(type(body).model_fields) - {
        "messages",
        "prompt",
        "prediction",
        "chat_template_kwargs",
        "documents",
    }
    fields = body.model_dump(include=wanted, exclude_unset=True)
    data = json.dumps({**fields, **placeholders}).encode()
    if len(data) > MAX_FIELDS_BYTES:
        raise InvalidRequest(f"the fields beside the prompt take more than {MAX_FIELDS_BYTES} bytes")
    return data


def _answer(value: object) -> bytes:
    data = _json(value)
    if len(data) > MAX_ANSWER_BYTES:
        raise InvalidRequest(f"the answer would be larger than {MAX_ANSWER_BYTES} bytes")
    return data


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
