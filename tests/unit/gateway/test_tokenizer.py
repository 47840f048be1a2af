"""Encoding, and chat templates as transformers renders them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, InvalidRequest
from common.model_folder.description import describe_model
from gateway.chat_template import ChatTemplate
from gateway.tokenizer import Tokenizer
from tests.support.gateway_server import MODELS

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


def test_a_chat_is_rendered_with_the_templates_and_tokens_of_the_folder(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }} {{ messages[0].content }}", "bos_token": "<s>"}
    path = folder(tmp_path, tokenizer_config_json=config)
    assert tokenizer_of(path).chat_template.render(SAY_HI) == "<s> hi"


def test_a_template_for_something_else_is_none_for_chats(tmp_path: Path) -> None:
    """As in transformers; a template for tools or documents says other things in a chat."""
    several = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tool_use")]
    tokenizer = tokenizer_of(folder(tmp_path, tokenizer_config_json={"chat_template": several}))
    with pytest.raises(InvalidRequest, match="no chat template for chats, only 'rag', 'tool_use'"):
        tokenizer.chat_template.render(SAY_HI)


def tokenizer_with(folder: Path, **parts: Any) -> Tokenizer:
    """Of the stories model, with other parts."""
    content = json.loads((MODELS / "stories260K" / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))
    return tokenizer_of(folder)


def test_tokens_that_the_decoder_fails_on_are_a_bad_request(tmp_path: Path) -> None:
    """The library panics over a text that is shorter than what is to be cut off."""
    strip = {"type": "Strip", "content": "▁", "start": 1, "stop": 1}
    tokenizer = tokenizer_with(tmp_path, decoder={"type": "Sequence", "decoders": [strip]})
    with pytest.raises(InvalidRequest, match="cannot decode these tokens"):
        tokenizer.decode(tokenizer.encode_now("  "))


def test_a_text_that_the_tokenizer_fails_on_is_a_bad_request(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}
    tokenizer = tokenizer_with(tmp_path, model=model, added_tokens=[], post_processor=None)
    with pytest.raises(InvalidRequest, match="cannot encode this text"):
        tokenizer.encode_now("b")


@pytest.mark.parametrize("bomb", ["{{ 'a' * 9000000000000 }}", "{% set x = '%99999999999999d' % 1 %}"])
def test_nothing_of_a_template_is_computed_when_it_is_compiled(bomb: str) -> None:
    """A constant of nine terabytes would be a `MemoryError` here."""
    ChatTemplate(bomb, {})
