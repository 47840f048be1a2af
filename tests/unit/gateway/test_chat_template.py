"""No message is lost between client and prompt, whatever form the template wants it in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import InvalidRequest, ModelError
from common.model_files import SHIPPED_MODEL
from common.model_folder.description import describe_model
from gateway.chat_template import ChatTemplate
from gateway.schemas import ChatBody, parse
from gateway.tokenizer import Tokenizer

SAY_HI = [{"role": "user", "content": "hi"}]
SAY_NOTHING = [{"role": "user", "content": ""}]


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    """Messages as a client sends them, through schema and template."""
    body = parse(ChatBody, json.dumps({"messages": messages}).encode())
    given = [message.for_template() for message in body.messages]
    return ChatTemplate(source, {"bos_token": "<s>"}).render(given, **options)


def says(role: str, *texts: str) -> dict[str, Any]:
    """One text is a string, several are parts."""
    if len(texts) == 1:
        return {"role": role, "content": texts[0]}
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


EACH = "{% for message in messages %}<{{ message.role }}>"
END = "{% endfor %}"
TEMPLATES = {
    "a string": EACH + "{{ message['content'] }}" + END,
    "a string, trimmed": EACH + "{{ message.content | trim }}" + END,
    "a string, added": EACH + "{{ '' + message['content'] + '' }}" + END,
    "a string as JSON": EACH + "{{ message.content | tojson }}" + END,
    "parts": EACH + "{% for part in message.content %}{{ part.text }}{% endfor %}" + END,
    "parts of a type": EACH
    + "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}" + END,
    "the first part": EACH + "{{ message.content[0].text }}" + END,
    "either, by test": EACH + "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}" + END,
    "either, by iterable": EACH + "{% if message.content is iterable and message.content is not string %}"
    "{{ message.content | map(attribute='text') | join('') }}{% else %}{{ message.content }}"
    "{% endif %}" + END,
    "iterable only": EACH
    + "{% if message.content is iterable %}{% for part in message.content %}{{ part.text }}"
    "{% endfor %}{% endif %}" + END,
    "selected": EACH
    + "{{ message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"
    + END,
    "the first that is selected": EACH
    + "{{ (message.content | selectattr('type', 'equalto', 'text') | first).text }}"
    + END,
    "a macro": "{% macro show(content) %}{% for part in content %}{{ part.text }}{% endfor %}"
    "{% endmacro %}" + EACH + "{{ show(message.content) }}" + END,
    "a macro that joins": "{% macro show(content) %}{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
    + EACH
    + "{{ show(message['content']) }}"
    + END,
    "a variable": EACH
    + "{% set said = message.content %}{% for part in said %}{{ part.text }}{% endfor %}"
    + END,
    "a namespace": "{% set ns = namespace(text='') %}"
    + EACH
    + "{% set ns.text = '' %}{% for part in message.content %}{% set ns.text = ns.text + part.text"
    " %}{% endfor %}{{ ns.text }}" + END,
    "messages behind a variable": "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
    "unlike by role": EACH
    + "{% if message.role == 'user' %}{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% else %}{{ message.content | trim }}{% endif %}" + END,
    "the system first": "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<{{ message.role }}>{% for part in message.content %}{{ part.text }}"
    "{% endfor %}{% endfor %}",
    "by index": "{% for i in range(messages | length) %}<{{ messages[i].role }}>"
    "{% for part in messages[i].content %}{{ part.text }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_said_comes_out_of_every_template(name: str) -> None:
    conversation = [
        says("system", "Be good."),
        says("user", "One", "two"),
        says("assistant", "Three"),
        says("user", "Four"),
        says("assistant", "Five", "six"),
        says("user", "Seven"),
    ]
    text = render(TEMPLATES[name], *conversation)
    for said in ("Be good.", "One", "two", "Three", "Four", "Five", "six", "Seven"):
        assert text.count(said) == 1, text
    for printed in ("'type'", '"type"', "[{"):
        assert printed not in text
    assert text.index("One") < text.index("two") < text.index("Three")


def test_content_is_passed_on_as_given_where_a_template_takes_both() -> None:
    source = (
        "{% for m in messages %}{{ 'text' if m.content is string else 'parts' }}"
        "{% for part in m.content if m.content is not string %}{{ part.text }}{% endfor %}"
        "{{ m.content if m.content is string }}{% endfor %}"
    )
    assert render(source, says("user", "a")) == "texta"
    assert render(source, says("user", "a", "b")) == "partsab"


def test_parts_are_joined_with_line_breaks_where_a_template_takes_a_string() -> None:
    assert render("{{ messages[0].content }}", says("user", "a", "b", "c")) == "a\nb\nc"


@pytest.mark.parametrize("source", [TEMPLATES["a string"], TEMPLATES["parts"]])
def test_nothing_said_is_nothing_printed(source: str) -> None:
    conversation = [says("user"), {"role": "assistant", "content": None}, says("user", "x")]
    assert render(source, *conversation) == "<user><assistant><user>x"


def test_every_spelling_of_a_text_part_comes_out() -> None:
    parts = [
        "a",
        {"type": "input_text", "text": "b"},
        {"text": "c"},
        {"type": "output_text", "text": "d"},
        {"type": "refusal", "refusal": "e"},
    ]
    for source in (TEMPLATES["parts of a type"], TEMPLATES["a string"]):
        text = render(source, {"role": "assistant", "content": parts})
        assert text.replace("\n", "") == "<assistant>abcde"


def test_a_refusal_is_what_the_assistant_said() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert render(TEMPLATES["a string"], refused, says("user", "x")) == ("<assistant>I will not.<user>x")


# ── What a template leaves out ───────────────────────────────────────────────────────────────────

ONLY = "{% for m in messages %}{% if m.role in ROLES %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "conversation", "lost"),
    [
        (ONLY.replace("ROLES", "['user']"), [says("system", "s"), says("user", "u")], 0),
        (ONLY.replace("ROLES", "['user']"), [says("user", "u"), says("assistant", "a")], 1),
        ("{{ messages[-1].content }}", [says("user", "first"), says("user", "last")], 0),
        ("{{ messages[0].content }}", [says("user", "first"), says("user", "last")], 1),
        ("fixed", [says("user", "x")], 0),
        (
            ONLY.replace("ROLES", "['user', 'assistant']"),
            [says("user", "u"), {"role": "tool", "content": "5", "tool_call_id": "1"}],
            1,
        ),
    ],
)
def test_a_message_that_would_vanish_is_a_bad_request_that_names_it(
    source: str, conversation: list[dict[str, Any]], lost: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"leaves out messages.{lost} ") as caught:
        render(source, *conversation)
    assert caught.value.param == f"messages.{lost}"


def test_a_developer_is_a_system_where_the_template_knows_no_developer() -> None:
    source = ONLY.replace("ROLES", "['system', 'user']")
    assert render(source, says("developer", "d"), says("user", "u")) == "<system>d<user>u"
    source = ONLY.replace("ROLES", "['developer', 'system', 'user']")
    assert render(source, says("developer", "d"), says("user", "u")) == "<developer>d<user>u"


@pytest.mark.parametrize(
    "source",
    [
        EACH + "{{ message.content | upper }}" + END,
        EACH + "{{ message.content.split('</think>')[-1] }}" + END,
        EACH + "{{ message.content | tojson }}" + END,
        EACH + "{{ message.content | replace('\n', ' ') }}" + END,
    ],
)
def test_a_template_may_change_what_was_said(source: str) -> None:
    said = '<think>so</think> a\n"b"'
    assert render(source, says("user", "x"), says("assistant", said), says("user", "y"))


def test_a_template_that_only_works_with_a_variable_is_tried_in_both_forms() -> None:
    """Shown messages without the variable it refuses, so nothing is known of it at load."""
    guard = "{% if not mode %}{{ raise_exception('mode?') }}{% endif %}"
    for name in ("a string", "parts", "the first part"):
        text = render(guard + TEMPLATES[name], says("user", "a"), variables={"mode": 1})
        assert text == "<user>a"


# ── Tool calls and reasoning in history ──────────────────────────────────────────────────────────

CALL = {"id": "c00000001", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c00000001", "content": "5"}
CALLS = {
    "an object": "{{ call.function.arguments | tojson }}",
    "text": "{{ '' + call.function.arguments }}",
    "either": "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}",
    "items": "{{ '{' }}{% for key, value in call.function.arguments.items() %}\"{{ key }}\": "
    "{{ value }}{% endfor %}{{ '}' }}",
}
SILENCES = {
    "content is optional": "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{{ call.function.name }}ARGUMENTS{% endfor %}",
    "null is the sign of a call": "{% if message.content is none %}{% for call in message.tool_calls"
    " %}{{ call.function.name }}ARGUMENTS{% endfor %}{% else %}{{ message.content }}{% endif %}",
    "content is a string": "{{ message.content + '' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}ARGUMENTS{% endfor %}",
    "content is printed": "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}ARGUMENTS{% endfor %}",
    "no content is the sign of a call": "{% if 'content' in message %}{{ message.content }}{% else %}"
    "{% for call in message.tool_calls %}{{ call.function.name }}ARGUMENTS{% endfor %}{% endif %}",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("content", [None, "", [], "missing"])
def test_a_call_in_history_comes_out_of_every_template(call: str, silence: str, content: Any) -> None:
    source = EACH + SILENCES[silence].replace("ARGUMENTS", CALLS[call]) + END
    calling: dict[str, Any] = {**CALLING, "content": content}
    if content == "missing":
        del calling["content"]
    text = render(source, says("user", "x"), calling, RESULT)
    assert text == '<user>x<assistant>add{"a": 1}<tool>5'


def test_a_call_may_be_named_by_its_id() -> None:
    source = (
        EACH + "{% for call in message.tool_calls or [] %}{{ call.id }}{{ call.function.arguments | tojson }}"
        "{% endfor %}{{ message.content or '' }}" + END
    )
    text = render(source, says("user", "x"), CALLING, RESULT)
    assert text == '<user>x<assistant>c00000001{"a": 1}<tool>5'


def test_a_call_that_would_vanish_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest, match=r"leaves out messages\.1 "):
        render(TEMPLATES["a string"], says("user", "x"), CALLING, RESULT)


@pytest.mark.parametrize("given", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_goes_by_any_of_its_names(given: str, read: str) -> None:
    source = EACH + f"{{{{ message.{read} }}}}{{{{ message.content }}}}" + END
    thought = {"role": "assistant", "content": "b", given: "a"}
    assert render(source, says("user", "x"), thought) == "<user>x<assistant>ab"


# ── Options ──────────────────────────────────────────────────────────────────────────────────────

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("m.content | trim", "m.content"),
        CHATML.replace("m.content | trim", "m.content[0].text"),
    ],
)
def test_the_last_message_can_be_continued(source: str) -> None:
    for last in (says("assistant", "Once upon a "), says("assistant", "x", "Once upon a ")):
        text = render(
            source, says("user", "x"), last, add_generation_prompt=False, continue_final_message=True
        )
        assert text.endswith("Once upon a ")
        assert text.startswith("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")


def test_what_the_template_trims_is_continued_without_it() -> None:
    """As in transformers: the model has never seen the space there."""
    text = render(
        CHATML,
        says("user", "x"),
        says("assistant", "Once upon a \n"),
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert text.endswith("assistant\nOnce upon a")


def test_what_a_template_changes_cannot_be_continued() -> None:
    source = EACH + "{{ message.content | upper }}" + END
    with pytest.raises(InvalidRequest) as caught:
        render(source, says("user", "x"), says("assistant", "y"), continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_the_message_that_is_lost_among_many_is_the_one_that_is_named() -> None:
    """Its text is in the others too."""
    source = "{% for m in messages %}{% if loop.index0 != 11 %}{{ m.content }}{% endif %}{% endfor %}"
    conversation = [says(role, "the same words again") for role in ("user", "assistant") * 8]
    with pytest.raises(InvalidRequest, match=r"leaves out messages\.11 "):
        render(source, *conversation)


@pytest.mark.parametrize("last", [CALLING, {"role": "assistant", "content": None}])
def test_what_says_nothing_cannot_be_continued(last: dict[str, Any]) -> None:
    source = EACH + SILENCES["content is optional"] + END
    with pytest.raises(InvalidRequest, match="no text") as caught:
        render(source, says("user", "x"), last, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(("name", "value"), [("documents", [{"text": "a"}]), ("reasoning_effort", "high")])
def test_what_the_template_is_to_read_is_refused_where_it_does_not(name: str, value: Any) -> None:
    read = EACH + "{{ message.content }}{{ " + name + " | string }}" + END
    text = render(read, says("user", "x"), variables={name: value})
    assert text == f"<user>x{value}"
    with pytest.raises(InvalidRequest, match=f"{name} is not supported") as caught:
        render(TEMPLATES["a string"], says("user", "x"), variables={name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("effort", ["none", "medium"])
def test_no_effort_and_the_usual_one_are_fine_with_every_model(effort: str) -> None:
    assert render(TEMPLATES["a string"], says("user", "x"), variables={"reasoning_effort": effort})


def test_what_a_template_raises_reaches_the_client() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system here!') }}"
        "{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(InvalidRequest, match="No system here!") as caught:
        render(source, says("system", "x"))
    assert caught.value.param == "messages"


def test_the_template_of_the_shipped_model_takes_what_clients_send() -> None:
    tokenizer = Tokenizer(describe_model(SHIPPED_MODEL))
    text = tokenizer.chat_template.render([says("user", "One", "two"), says("assistant", "Three")])
    assert all(said in text for said in ("One", "two", "Three"))


# ── The environment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {{ m.role }}\n{% endfor %}", "  user\n"),
        ("    {% if true %}\nx{% endif %}", "x"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": ""}]'),
        ("{{ {'a': 'é<'} | tojson(indent=1) }}", '{\n "a": "é<"\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ mood }}{{ tools is none }}", "goodTrue"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(SAY_NOTHING, variables={"mood": "good"}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content }}",
        "{{ 'x' + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_whatever_a_template_raises_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(SAY_HI)
    assert caught.value.param == "messages"


def test_a_client_cannot_replace_what_the_template_is_given() -> None:
    template = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", {})
    variables = {"messages": [], "add_generation_prompt": False}
    assert template.render(SAY_NOTHING, variables=variables) == "1True"


def test_a_template_that_does_not_compile_is_an_error_at_start() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}", {})
