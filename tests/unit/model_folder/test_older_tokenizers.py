"""Folders with only the files of older tokenizers are served as if they had `tokenizer.json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from common.errors import CheckpointError, ModelError
from common.model_folder.description import describe_model
from tests.support.checkpoints import SHARED_MODELS
from tests.support.model_folders import write

TEXTS = [
    "Hello world's 123456 naïve  \n\n x",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "日本語  🎉 don't I'LL e\u0301",
    "\t\t  a\r\n",
    "",
    " ",
]


def older(folder: Path, name: str, **config: Any) -> Path:
    """The folder of a real tokenizer without its `tokenizer.json`."""
    source = SHARED_MODELS / "tokenizers" / name
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(source / file, folder)
    said = json.loads((source / "tokenizer_config.json").read_text())
    return write(folder, tokenizer_config_json=said | config)


def real(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(SHARED_MODELS / "tokenizers" / name / "tokenizer.json"))


def of(folder: Path) -> tokenizers.Tokenizer:
    tokenizer = describe_model(folder).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_vocabulary_and_merges_give_the_ids_of_the_real_tokenizer(name: str, tmp_path: Path) -> None:
    mine, theirs = of(older(tmp_path, name)), real(name)
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert mine.encode(text).ids == ids
        assert mine.decode(ids) == theirs.decode(ids)


def test_the_family_says_how_text_is_cut_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    folder = older(tmp_path, "qwen2", tokenizer_class="PreTrainedTokenizerFast")
    write(folder, config_json={"model_type": "qwen3"})
    assert of(folder).encode(TEXTS[0]).ids == real("qwen2").encode(TEXTS[0]).ids


def test_a_converted_tokenizer_adds_the_ends_that_its_config_asks_for(tmp_path: Path) -> None:
    folder = older(tmp_path, "gpt2", add_bos_token=True)
    assert of(folder).encode("hi").ids == [50256, *real("gpt2").encode("hi").ids]


def test_a_class_that_cuts_text_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="CLIPTokenizer"):
        describe_model(older(tmp_path, "gpt2", tokenizer_class="CLIPTokenizer"))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("vocab.json", '{"a": "0"}', "'a' has the id '0'"),
        ("vocab.json", "[]", r"vocab\.json"),
        ("merges.txt", "a b c", r"merges\.txt: line 1 "),
        ("merges.txt", "#version: 0.2\nab", r"merges\.txt: line 2 "),
        ("merges.txt", "zzz yyy", r"merges\.txt does not fit"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, text: str, said: str) -> None:
    folder = older(tmp_path, "gpt2")
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        describe_model(folder)
