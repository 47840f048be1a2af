"""A folder with only a `tokenizer.model` is served as if it had `tokenizer.json`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.model_folder import conversion
from common.model_folder.description import describe_model
from tests.support.model_folders import write

sentencepiece = pytest.importorskip("sentencepiece", reason="pdq[tokenizers] is not installed")
pytest.importorskip("google.protobuf", reason="pdq[tokenizers] is not installed")

TALE = "Once upon a time there was a king who had a daughter. She said: naïve, café! 1234\n" * 30
SPECIAL = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return Path(conversion.CACHE).expanduser()


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """A folder with a small `tokenizer.model` of Llama's kind."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TALE.splitlines()),
        model_writer=written,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
    )
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return write(folder, tokenizer_config_json=SPECIAL, config_json={"model_type": "llama"})


def test_a_sentencepiece_model_is_converted_once(sentencepiece_folder: Path, cache: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "tokenizer.model"))
    model = describe_model(sentencepiece_folder)
    assert model.stop_token_ids == (2,)
    assert model.tokenizer is not None
    for text in ("Once upon a king", "naïve 123 日本", "a\nb"):
        assert model.tokenizer.encode(text).ids == [1, *theirs.encode(text)]
        assert model.tokenizer.decode(theirs.encode(text)) == text
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text().replace('"<s>"', '"<x>"'))  # to see that it is read
    again = describe_model(sentencepiece_folder).tokenizer
    assert again is not None
    assert again.token_to_id("<x>") == 1


def test_a_cache_that_cannot_be_written_is_done_without(sentencepiece_folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    assert describe_model(sentencepiece_folder).special_tokens["bos_token"] == "<s>"


def test_a_file_that_is_no_sentencepiece_model_is_named(sentencepiece_folder: Path) -> None:
    (sentencepiece_folder / "tokenizer.model").write_bytes(b"\x00nonsense" * 10)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be converted") as caught:
        describe_model(sentencepiece_folder)
    assert "\n" not in str(caught.value)
