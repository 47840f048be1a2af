"""How a chat template wants its messages, found by showing it some.

Templates take `content` as a string, or as a list of parts, or either, and not for every role alike;
arguments of a tool call as an object or as JSON text; an assistant that only calls tools with null,
with "" or without content. What a template does not expect it drops silently, and a syntax tree does
not tell (macros, namespaces, filters, variables). So each role is rendered in each form, with marks
for text, and a form counts when its marks come out.

Owns: the forms, the marks, and the check that nothing of a conversation was left out. Knows nothing
of jinja.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[list[dict[str, Any]]], str]

MARK = "pdqzmark"
_MARKS = re.compile(rf"{MARK}\d+z\d+z")
TELLING = 16  # characters of a text that is not in a prompt by chance
CALL_ID = "pdq000001"  # nine letters and digits, as Mistral's templates want
SAYS = "x"
STAND_INS = {"developer": "system", "function": "tool"}


class Form(enum.Enum):
    """What `content` is."""

    STRING = "a string"
    PARTS = "a list of parts"
    ONE_PART = "a list of which the first part is read"


@dataclasses.dataclass(frozen=True, slots=True)
class MessageForms:
    """What a template takes. A role without forms never came out: it is unknown or undecided."""

    contents: Mapping[str, frozenset[Form]]
    silence: tuple[Any, ...] = ("",)  # the content of an assistant that only calls; (): none
    arguments_as_text: bool = False

    def undecided(self, messages: Sequence[Message]) -> bool:
        return not all(self.contents.get(message["role"]) for message in messages)

    def apply(self, message: Message, otherwise: Form = Form.STRING) -> dict[str, Any]:
        """`message` in the form that its role wants, and `otherwise` where none is known."""
        role: str = message["role"]
        stand_in = STAND_INS.get(role, role)
        if not self.contents.get(role) and self.contents.get(stand_in):
            role = stand_in
        forms = self.contents.get(role) or frozenset({otherwise})
        shaped = {**message, "role": role, "content": _shaped(message.get("content"), forms)}
        if calls := message.get("tool_calls"):
            shaped["tool_calls"] = [self._call(call) for call in calls]
            if not message.get("content"):
                del shaped["content"]
                shaped.update(dict(zip(("content",), self.silence, strict=False)))
        return shaped

    def _call(self, call: Message) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            arguments = _object_in(arguments)
        return {**call, "function": {**function, "arguments": arguments}}


def find_forms(render: Render) -> MessageForms:
    """What the template behind `render` takes. `render` raises anything for what it refuses."""
    contents = {
        role: frozenset(form for form in Form if _comes_out(render, role, form))
        for role in ("system", "developer", "user", "assistant", "tool", "function")
    }
    usual = MessageForms(contents)
    user = usual.apply({"role": "user", "content": SAYS})
    nones = (_rendered(render, [user]) or "").count("None")
    for sloppy, as_text, silence in itertools.product((False, True), (False, True), ((None,), ("",), ())):
        forms = MessageForms(contents, silence, as_text)
        result = forms.apply({"role": "tool", "content": SAYS, **_RESULT})
        call = forms.apply({"role": "assistant", "content": None, "tool_calls": [_CALL]})
        for conversation in ([user, call, result], [user, call], [user, call, result, user]):
            text = _rendered(render, conversation)
            if text is not None and _call_is_in(text, nones, sloppy):
                return forms
    return usual


def all_in_order(messages: Sequence[Message], text: str) -> bool:
    """Whether all that was said is certainly in `text` as it is. If not, it may be too short to tell
    or changed by the template (JSON, say): then `marked` messages tell."""
    position = 0
    for said in itertools.chain.from_iterable(map(_said, messages)):
        said = said.strip()
        found = text.find(said, position)
        if found < 0 or 0 < len(said) < TELLING:
            return False
        position = found + len(said)
    return True


def marked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with a mark in the place of everything that must come out."""
    return [_marked(message, index) for index, message in enumerate(messages)]


def left_out(messages: Sequence[Message], rendered: str) -> int | None:
    """The first of `messages` whose marks are not all in `rendered`."""
    rendered = rendered.lower()
    found = set(_MARKS.findall(rendered))
    for index, message in enumerate(messages):
        ids = [call.get("id") or "" for call in message.get("tool_calls", ())]
        for part, said in enumerate(_said(message)):
            if not said.strip() or _mark(index, part) in found:
                continue
            if not (ids and ids[part] and ids[part].lower() in rendered):
                return index
    return None


def _said(message: Message) -> list[str]:
    """What of a message must come out: its texts, or the names of the functions it calls (some
    templates write the call's id instead). Many leave out what was said beside a call."""
    if calls := message.get("tool_calls"):
        return [call["function"]["name"] for call in calls]
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [content] if content else []


def _marked(message: Message, index: int) -> dict[str, Any]:
    if calls := message.get("tool_calls"):
        named = [
            {**call, "function": {**call["function"], "name": _mark(index, at)}}
            for at, call in enumerate(calls)
        ]
        return {**message, "tool_calls": named}
    content = message.get("content")
    if isinstance(content, list):
        parts = [{**part, "text": _mark(index, at)} for at, part in enumerate(content)]
        return {**message, "content": parts}
    return {**message, "content": _mark(index, 0)} if content else dict(message)


def _mark(message: int, part: int) -> str:
    return f"{MARK}{message}z{part}z"


def _shaped(content: Any, forms: frozenset[Form]) -> Any:
    if isinstance(content, list) and Form.PARTS in forms:
        return content
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    content = content or ""
    return content if Form.STRING in forms else [{"type": "text", "text": content}]


def _object_in(text: str) -> Any:
    """The arguments that a model wrote, as an object; as text where they are no JSON object."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


# ── Probing ──────────────────────────────────────────────────────────────────────────────────────

_CALL: dict[str, Any] = {
    "id": CALL_ID,
    "type": "function",
    "function": {"name": f"{MARK}name", "arguments": {"key": f"{MARK}value"}},
}
_RESULT = {"name": f"{MARK}name", "tool_call_id": CALL_ID}


def _comes_out(render: Render, role: str, form: Form) -> bool:
    content: Any = MARK + "0"
    if form is not Form.STRING:
        content = [{"type": "text", "text": content}]
    if form is Form.PARTS:
        content.append({"type": "text", "text": MARK + "1"})
    marks = [MARK + "0"] if form is not Form.PARTS else [MARK + "0", MARK + "1"]
    probe = {"role": role, "content": content}
    for fill in (SAYS, [{"type": "text", "text": SAYS}]):
        for conversation in _conversations(probe, fill):
            text = _rendered(render, conversation)
            if text is not None and all(_is_clean(text, mark) for mark in marks):
                return True
    return False


def _conversations(probe: dict[str, Any], fill: Any) -> Iterator[list[dict[str, Any]]]:
    user = {"role": "user", "content": fill}
    assistant = {"role": "assistant", "content": fill}
    if probe["role"] in ("tool", "function"):
        silences: tuple[dict[str, Any], ...] = ({"content": None}, {"content": ""}, {}, {"content": fill})
        for silence, arguments in itertools.product(silences, ({"key": "x"}, '{"key": "x"}')):
            function = {**_CALL["function"], "arguments": arguments}
            call = {"role": "assistant", **silence, "tool_calls": [{**_CALL, "function": function}]}
            yield [user, call, {**probe, **_RESULT}]
            yield [user, call, {**probe, **_RESULT}, assistant, user]
    elif probe["role"] in ("system", "developer"):
        yield [probe, user]
        yield [probe, user, assistant, user]
    elif probe["role"] == "assistant":
        yield [user, probe, user]
        yield [user, probe]
    else:
        yield [probe]
        yield [{"role": "system", "content": fill}, probe]
        yield [probe, assistant, user]
        yield [user, assistant, probe]


def _rendered(render: Render, conversation: list[dict[str, Any]]) -> str | None:
    try:
        return render(conversation)
    except Exception:  # a template is somebody's program: it refuses in any way it likes
        return None


def _is_clean(text: str, mark: str) -> bool:
    """Whether a mark came out as text, and not inside a part that was printed as an object."""
    before, found, _ = text.partition(mark)
    printed = before.replace("\\", "").rstrip("\"' ").removesuffix(":").rstrip("\"' ")
    return bool(found) and not printed.endswith(("'text", '"text'))


def _call_is_in(text: str, nones: int, sloppy: bool) -> bool:
    """Whether name and arguments came out; unless `sloppy`, as JSON and without a printed None."""
    named = f"{MARK}name" in text or CALL_ID in text
    if not named or f"{MARK}value" not in text:
        return False
    before = text[: text.index(f"{MARK}value")]
    return sloppy or (text.count("None") <= nones and not before.endswith(("{'key': '", '\\"')))
