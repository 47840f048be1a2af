"""Encoding, and chat templates as transformers renders them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, InvalidRequest, ModelError
from common.model_folder.description import describe_model
from gateway.chat_template import ChatTemplate
from gateway.tokenizer import LONG_TEXT, Tokenizer
from tests.support.gateway_server import MODELS, load_tokenizer

SAY_HI = [{"role": "user", "content": "hi"}]


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer(describe_model(folder))


def folder(tmp_path: Path, **files: Any) -> Path:
    """A copy of the stories tokenizer, with other files beside it."""
    shutil.copy(MODELS / "stories260K" / "tokenizer.json", tmp_path)
    for name, value in files.items():
        stem, _, suffix = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / f"{stem}.{suffix}").write_text(text)
    return tmp_path


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer_of(tmp_path)


async def test_long_and_short_texts_are_encoded_alike() -> None:
    tokenizer = load_tokenizer("stories260K")
    text = "Once upon a time. " * (LONG_TEXT // 10)
    assert await tokenizer.encode(text) == tokenizer.encode_now(text)
    assert await tokenizer.encode("a") == tokenizer.encode_now("a")


def test_a_chat_is_rendered_with_the_templates_and_tokens_of_the_folder(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }} chat", "bos_token": "<s>"}
    path = folder(tmp_path, tokenizer_config_json=config)
    assert tokenizer_of(path).render_chat(SAY_HI) == "<s> chat"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {{ m.role }}\n{% endfor %}", "  user\n"),
        ("    {% if true %}\nx{% endif %}", "x"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': 'é<'} | tojson(indent=1) }}", '{\n "a": "é<"\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ mood }}{{ tools is none }}", "goodTrue"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(SAY_HI, variables={"mood": "good"}) == expected


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
    assert template.render(SAY_HI, variables=variables) == "1True"


def test_a_template_that_does_not_compile_is_an_error_at_start() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}", {})
