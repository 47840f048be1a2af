"""A tokenizer is read with everything that other files say about its tokens, as transformers does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, ModelError, UnsupportedModel
from common.model_folder.description import ModelDescription, describe_model
from tests.support.checkpoints import SHARED_MODELS, STORIES
from tests.support.model_folders import described, write

GPT2 = SHARED_MODELS / "tokenizers" / "gpt2"
TEXT = "<s> Once <|im_start|>upon</s> a time"


def changed(folder: Path, change: Callable[[dict[str, Any]], None], source: Path = STORIES) -> Path:
    """A folder whose `tokenizer.json` is that of `source` after `change`."""
    content = json.loads((source / "tokenizer.json").read_text())
    change(content)
    return write(folder, tokenizer_json=content)


def ids(model: ModelDescription, text: str) -> list[int]:
    assert model.tokenizer is not None
    found: list[int] = model.tokenizer.encode(text).ids
    return found


def transformers_ids(folder: Path, text: str) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def test_truncation_padding_and_dropout_that_were_saved_are_off(tmp_path: Path) -> None:
    def save(content: dict[str, Any]) -> None:
        content["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }
        content["model"]["dropout"] = 0.5

    text = "Once upon a time there was a king. " * 5
    assert ids(describe_model(changed(tmp_path, save)), text) == ids(describe_model(STORIES), text)


EXTRA = {"content": "<|im_start|>", "special": True, "normalized": False}
ADDITIONS: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {"tokenizer_config_json": {"added_tokens_decoder": {"512": EXTRA}}},
    "added_tokens.json": {"added_tokens_json": {"<|im_start|>": 512}},
    "additional_special_tokens": {"tokenizer_config_json": {"additional_special_tokens": ["<|im_start|>"]}},
    "extra_special_tokens": {
        "tokenizer_config_json": {"extra_special_tokens": {"start_token": "<|im_start|>"}}
    },
    "model_specific_special_tokens": {
        "tokenizer_config_json": {"model_specific_special_tokens": {"start": "<|im_start|>"}}
    },
    "special_tokens_map.json": {"special_tokens_map_json": {"additional_special_tokens": ["<|im_start|>"]}},
    "a named token": {"tokenizer_config_json": {"pad_token": "<|im_start|>"}},
    "a named token in the map": {"special_tokens_map_json": {"pad_token": EXTRA}},
}


@pytest.mark.parametrize("where", ADDITIONS)
def test_a_token_that_another_file_adds_is_one_token(tmp_path: Path, where: str) -> None:
    model = described(tmp_path, config_json={"vocab_size": 520}, **ADDITIONS[where])
    assert 512 in ids(model, TEXT)
    if "tokenizer_config_json" not in ADDITIONS[where]:
        write(tmp_path, tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert ids(model, TEXT) == transformers_ids(tmp_path, TEXT)


@pytest.mark.parametrize("where", ADDITIONS)
def test_a_token_beyond_the_embedding_stays_text(tmp_path: Path, where: str) -> None:
    model = described(tmp_path, config_json={"vocab_size": 512}, **ADDITIONS[where])
    assert max(ids(model, TEXT)) < 512


def test_a_token_that_another_file_calls_special_is(tmp_path: Path) -> None:
    def ordinary(content: dict[str, Any]) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "</s>"]

    folder = changed(tmp_path, ordinary)
    write(folder, tokenizer_config_json={"eos_token": "</s>", "unk_token": "<unk>"})
    model = describe_model(folder)
    assert model.stop_token_ids == (2,)
    assert model.tokenizer is not None
    assert model.tokenizer.decode([2, 403]) == model.tokenizer.decode([403])


def test_a_token_that_has_a_name_is_special_whatever_tokenizer_json_says(tmp_path: Path) -> None:
    def ordinary(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token |= {"special": False, "lstrip": token["content"] == "</s>"}

    folder = changed(tmp_path, ordinary)
    named = {"bos_token": "<s>", "additional_special_tokens": ["</s>"]}
    model = describe_model(write(folder, tokenizer_config_json=named))
    assert model.tokenizer is not None
    text = "<s>Once   </s>upon<unk>"
    assert ids(model, text) == transformers_ids(folder, text)
    assert model.tokenizer.decode(ids(model, text)) == "Once upon<unk>"


def test_a_token_of_added_tokens_json_has_the_flags_of_its_name(tmp_path: Path) -> None:
    model = described(
        tmp_path,
        config_json={"vocab_size": 520},
        added_tokens_json={"<mask>": 512},
        tokenizer_config_json={"mask_token": {"content": "<mask>", "lstrip": True}},
    )
    assert model.tokenizer is not None
    added = model.tokenizer.get_added_tokens_decoder()[512]
    assert (added.content, added.special, added.lstrip) == ("<mask>", True, True)


@pytest.mark.parametrize("said", [600, 5, 1])
def test_an_id_that_the_library_would_change_is_an_error(tmp_path: Path, said: int) -> None:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": said, "content": "<x>", "special": True, **token})

    with pytest.raises(CheckpointError, match=f"'<x>' the id {said}, but .* 512"):
        describe_model(changed(tmp_path, add))


def test_a_token_without_text_is_none(tmp_path: Path) -> None:
    decoder = {"512": {"content": ""}, "513": {"content": "<x>"}}
    config = {"tokenizer_config_json": {"eos_token": {"content": ""}}}
    assert described(tmp_path, **config).stop_token_ids == ()
    with pytest.raises(CheckpointError, match=r"<x>.* id 513"):  # 512 is none
        described(tmp_path, tokenizer_config_json={"added_tokens_decoder": decoder})


def test_special_tokens_that_are_to_be_read_as_text_are_refused(tmp_path: Path) -> None:
    """A chat could not be told from what is said in it."""
    with pytest.raises(UnsupportedModel, match="split_special_tokens"):
        described(tmp_path, tokenizer_config_json={"split_special_tokens": True})


@pytest.mark.parametrize("said", [True, False])
def test_what_is_added_at_the_ends_is_what_the_tokenizer_says(tmp_path: Path, said: bool) -> None:
    config = {"add_bos_token": said, "add_eos_token": said, "bos_token": "<s>", "eos_token": "</s>"}
    model = described(tmp_path, tokenizer_config_json=config)
    assert ids(model, TEXT) == ids(describe_model(STORIES), TEXT) == transformers_ids(tmp_path, TEXT)


def test_the_map_holds_where_the_newer_field_is_missing(tmp_path: Path) -> None:
    older = described(
        tmp_path,
        tokenizer_config_json={"eos_token": "</s>"},
        special_tokens_map_json={"eos_token": {"content": "<s>"}, "pad_token": None},
    )
    assert older.special_tokens["eos_token"] == "<s>"
    newer = described(
        tmp_path,
        tokenizer_config_json={
            "eos_token": "</s>",
            "unk_token": None,
            "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
        },
        special_tokens_map_json={"eos_token": "<s>", "unk_token": "<unk>"},
    )
    assert newer.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}


def test_an_added_token_whose_id_leaves_a_gap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"<new>.*520.*512"):
        described(tmp_path, added_tokens_json={"<new>": 520})


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ({"added_tokens_json": {"<new>": "512"}}, "<new>"),
        ({"tokenizer_config_json": {"eos_token": 2}}, "eos_token"),
        ({"tokenizer_config_json": {"eos_token": ["</s>"]}}, "eos_token"),
        ({"tokenizer_config_json": {"eos_token": {"text": "</s>"}}}, "eos_token"),
        ({"tokenizer_config_json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"x": EXTRA}}}, "added_tokens_decoder"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"512": 5}}}, "added_tokens_decoder.512"),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"512": EXTRA | {"special": "yes"}}}},
            "added_tokens_decoder.512",
        ),
        ({"special_tokens_map_json": {"additional_special_tokens": "<x>"}}, "additional_special_tokens"),
        ({"special_tokens_map_json": {"additional_special_tokens": [5]}}, "additional_special_tokens"),
    ],
)
def test_a_token_that_is_none_is_an_error_naming_the_field(
    tmp_path: Path, files: dict[str, Any], field: str
) -> None:
    with pytest.raises(ModelError) as caught:
        described(tmp_path, **files)
    assert caught.value.param == field
    assert next(iter(files)).removesuffix("_json") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "Unheard"}},
        {"added_tokens": [{"id": 1}]},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"decoder": {"type": "Unheard"}},
    ],
)
def test_a_tokenizer_of_nonsense_is_one_error_that_names_it(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        describe_model(changed(tmp_path, lambda content: content.update(change)))


# ── The digest ───────────────────────────────────────────────────────────────────────────────────


def old_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def without_defaults(content: dict[str, Any]) -> None:
    content["version"] = "1.0"
    content["truncation"] = None
    for field in ("dropout", "ignore_merges"):
        del content["model"][field]


def other_order(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))


@pytest.mark.parametrize("change", [old_merges, without_defaults, other_order])
def test_the_same_tokenizer_written_otherwise_has_the_same_digest(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    plain = changed(tmp_path, lambda content: None)
    digest = describe_model(plain).tokenizer_digest
    assert describe_model(changed(tmp_path, change)).tokenizer_digest == digest


def another_id(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def another_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def another_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def no_special_tokens(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def other_bytes(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


@pytest.mark.parametrize(
    "change", [another_id, another_merge, another_normalizer, no_special_tokens, other_bytes]
)
def test_whatever_gives_other_ids_gives_another_digest(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    digest = describe_model(changed(tmp_path, lambda content: None)).tokenizer_digest
    assert describe_model(changed(tmp_path, change)).tokenizer_digest != digest


def test_another_end_or_another_token_gives_another_digest(tmp_path: Path) -> None:
    digests = {
        described(tmp_path, config_json={"vocab_size": 520}).tokenizer_digest,
        described(tmp_path, generation_config_json={"eos_token_id": 5}).tokenizer_digest,
        described(tmp_path, added_tokens_json={"<new>": 512}).tokenizer_digest,
    }
    assert len(digests) == 3


def test_a_digest_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    copy = described(tmp_path, tokenizer=GPT2)
    again = describe_model(changed(tmp_path, lambda content: None, GPT2))
    assert copy.tokenizer_digest == again.tokenizer_digest
