"""The model's folder as the gateway reads it: limits, chat templates, encoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, InvalidRequest, ModelError
from gateway.chat_template import ChatTemplate
from gateway.tokenizer import LONG_TEXT, Tokenizer
from tests.support.gateway_server import MODELS, load_tokenizer

SAY_HI = [{"role": "user", "content": "hi"}]


def folder(tmp_path: Path, **files: Any) -> Path:
    """A copy of the stories tokenizer, with other files beside it."""
    shutil.copy(MODELS / "stories260K" / "tokenizer.json", tmp_path)
    for name, value in files.items():
        stem, _, suffix = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / f"{stem}.{suffix}").write_text(text)
    return tmp_path


def test_limits_come_from_the_config_files() -> None:
    limits = load_tokenizer("stories260K").limits
    assert (limits.vocab_size, limits.max_model_len, limits.eos_token_ids) == (512, 512, (2, 1))
    limits = load_tokenizer("tokenizers/qwen2").limits
    assert (limits.max_model_len, limits.eos_token_ids) == (32768, (151645,))


def test_limits_of_a_model_whose_text_part_is_nested_or_unlimited(tmp_path: Path) -> None:
    nested = {"text_config": {"vocab_size": 600, "max_position_embeddings": 64}, "eos_token_id": 5}
    limits = Tokenizer(folder(tmp_path, config_json=nested)).limits
    assert (limits.vocab_size, limits.max_model_len, limits.eos_token_ids) == (600, 64, (5,))
    unlimited = folder(tmp_path, config_json={}, tokenizer_config_json={"model_max_length": 1e30})
    assert Tokenizer(unlimited).limits.max_model_len is None


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_a_typed_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Tokenizer(folder(tmp_path, config_json=text))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(folder(tmp_path, config_json={}, tokenizer_json=text))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


async def test_long_and_short_texts_are_encoded_alike() -> None:
    tokenizer = load_tokenizer("stories260K")
    text = "Once upon a time. " * (LONG_TEXT // 10)
    assert await tokenizer.encode(text) == tokenizer.encode_now(text)
    assert await tokenizer.encode("a") == tokenizer.encode_now("a")


def test_the_template_file_wins_over_the_one_in_the_config(tmp_path: Path) -> None:
    config = {"chat_template": "config", "bos_token": {"content": "<s>"}, "eos_token": None}
    path = folder(tmp_path, tokenizer_config_json=config)
    assert Tokenizer(path).render_chat(SAY_HI) == "config"
    folder(tmp_path, chat_template_jinja="{{ bos_token }}{{ eos_token }} file")
    assert Tokenizer(path).render_chat(SAY_HI) == "<s> file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    path = folder(tmp_path, tokenizer_config_json={"chat_template": several})
    assert Tokenizer(path).render_chat(SAY_HI) == "d"


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
