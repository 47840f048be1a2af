"""Chat messages to one prompt string, by the model's own jinja2 template, in a sandbox.

Owns: the environment that templates expect, the same as that of transformers
(`utils/chat_template_utils.py`): trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, a `tojson` that keeps characters as they are, and `{% generation %}` blocks. And the
promise that no message is lost: each is given in a form that comes out, or the request is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import secrets
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from common.errors import InvalidRequest, ModelError
from gateway.message_forms import MARK, Form, MessageForms, Render, all_in_order, find_forms, left_out, marked

FIELDS_TO_READ = frozenset({"documents", "reasoning_effort"})  # or they would be lost
ASK_FOR_NOTHING = ("none", "medium")  # efforts that a model without reasoning is fine with


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said; here it only prints."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@jinja2.pass_context
def _as_it_is(context: jinja2.runtime.Context, value: Any) -> Any:
    return value


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        # Nothing of a template is computed before it is rendered, which is done under limits:
        optimized=False,  # … no constant expression,
        finalize=_as_it_is,  # … nor one that is put out
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _undeclared(environment: jinja2.Environment, source: str) -> set[str]:
    """`jinja2.meta.find_undeclared_variables` without computing constant expressions."""
    syntax = environment.parse(source)
    generator = jinja2.meta.TrackingCodeGenerator(environment)
    generator.optimizer = None
    generator.visit(syntax)
    return generator.undeclared_identifiers


class ChatTemplate:
    """A compiled template; `special_tokens` (`bos_token`, …) are variables in it."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._read = _undeclared(environment, source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = special_tokens

    def reads(self, name: str) -> bool:
        """Whether the template has a variable of this name."""
        return name in self._read

    @functools.cached_property
    def _forms(self) -> MessageForms:
        # Found by rendering, which is done where a template may take long.
        return find_forms(functools.partial(self._raw, True, {}))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt. With `continue_final_message` it ends where the last message does.

        Raises `InvalidRequest` when the template refuses these messages or leaves one out.
        """
        variables = variables or {}
        for name in FIELDS_TO_READ & variables.keys() - self._read:
            if variables[name] not in ASK_FOR_NOTHING:
                raise InvalidRequest(
                    f"{name} is not supported: the model's chat template does not read it", param=name
                )
        render = functools.partial(self._raw, add_generation_prompt, variables)
        forms = [Form.STRING]
        if self._forms.undecided(messages):
            forms.append(Form.PARTS)
        refusals = []
        for form in forms:
            shaped = [self._forms.apply(message, form) for message in messages]
            try:
                return _complete(render, shaped, continue_final_message)
            except InvalidRequest as error:
                refusals.append(error)
        raise refusals[0]

    def _raw(
        self, add_generation_prompt: bool, variables: dict[str, Any], messages: list[dict[str, Any]]
    ) -> str:
        """Raises whatever the template raises."""
        return self._template.render(
            {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **variables,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def _complete(render: Render, messages: list[dict[str, Any]], continues: bool) -> str:
    """The text of `messages`, all of which must be in it."""
    end = f"{MARK}{secrets.token_hex(8)}" if continues else ""
    if continues:
        messages = [*messages[:-1], _with_end(messages[-1], end + " ")]
    try:
        text = render(messages)
    except Exception as error:
        # A template is a program of the model's author over the client's data: whatever it
        # raises (TemplateError, TypeError, KeyError, …) means it cannot render these messages.
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from error
    absent = None
    if not all_in_order(messages, text):
        with contextlib.suppress(Exception):
            absent = left_out(messages, render(marked(messages)))
    if absent is not None:
        raise InvalidRequest(
            f"the model's chat template leaves out messages.{absent} (role {messages[absent]['role']})",
            param=f"messages.{absent}",
        )
    if continues and end not in text:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not end with the last message",
            param="continue_final_message",
        )
    if not continues:
        return text
    said, _, rest = text.rpartition(end)
    # A template that has trimmed the space behind the mark would have trimmed the message's too.
    return said if rest.startswith(" ") else said.rstrip()


def _with_end(message: dict[str, Any], end: str) -> dict[str, Any]:
    content = message.get("content")
    if not content or message.get("tool_calls"):
        raise InvalidRequest(
            "continue_final_message: the last message has no text", param="continue_final_message"
        )
    if isinstance(content, str):
        return {**message, "content": content + end}
    last = {**content[-1], "text": content[-1]["text"] + end}
    return {**message, "content": [*content[:-1], last]}
