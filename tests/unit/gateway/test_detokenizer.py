"""The detokenizer never emits half a character, and its deltas are the whole text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from common.errors import UnsupportedModel
from common.model_folder.description import describe_model
from gateway.decoder_stages import REPLACEMENT
from gateway.detokenizer import Decoder, Detokenizer
from gateway.tokenizer import Tokenizer

MODELS = Path(__file__).parents[4] / "shared" / "models"
FOLDERS = ["tokenizers/gpt2", "tokenizers/qwen2", "stories260K", "babyllama361"]
TEXTS = [
    "Once upon a time, there was a  little girl.\n\tShe  smiled.",
    "naïve café – “quotes” … €",
    "你好，世界！👩‍👩‍👧‍👦🏳️‍🌈 नमस्ते สวัสดี",
    " leading and trailing ",
]


@functools.cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(describe_model(MODELS / name))


@functools.cache
def theirs(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))


def deltas(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_of_random_ids_are_the_text_of_all_ids(name: str, data: st.DataObject) -> None:
    size = ours(name).model.vocab_size
    any_id = st.integers(0, size + 5) | st.integers(0, min(size, 300))  # low ids: bytes, specials
    ids = data.draw(st.lists(any_id, max_size=60))
    assert "".join(deltas(ours(name).detokenizer(), ids)) == theirs(name).decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(TEXTS), cut=st.integers(0, 60))
def test_a_completion_continues_its_prompt(name: str, text: str, cut: int) -> None:
    whole = theirs(name)
    ids = whole.encode(text, add_special_tokens=False).ids
    prompt, completion = ids[:cut], ids[cut:]
    if REPLACEMENT in whole.decode(prompt) or not text.startswith(whole.decode(prompt)):
        return  # cut inside a character, or the normalizer changed the text
    continued = "".join(deltas(ours(name).detokenizer(prompt), completion))
    assert whole.decode(prompt) + continued == whole.decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_holds_half_a_character(name: str, text: str) -> None:
    ids = theirs(name).encode(text, add_special_tokens=False).ids
    assert not any(REPLACEMENT in delta for delta in deltas(ours(name).detokenizer(), ids))


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    gpt2 = ours("tokenizers/gpt2")
    ids = gpt2.encode_now("a😀")
    assert len(ids) > 2
    assert deltas(gpt2.detokenizer(), ids[:-1])[-1] == REPLACEMENT


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    gpt2 = ours("tokenizers/gpt2")
    ids = gpt2.encode_now("a𒀀b")  # a character of several tokens
    assert len(ids) > 4
    for cut in range(2, len(ids) - 1):
        assert "".join(deltas(gpt2.detokenizer(ids[:cut]), ids[cut:])) == "𒀀b"


def test_the_space_of_the_first_word_belongs_to_the_completion() -> None:
    stories = ours("stories260K")
    prompt = stories.encode_now("Once upon")
    completion = stories.encode_now("a time", add_special_tokens=False)
    assert stories.decode(completion) == "a time"
    assert "".join(deltas(stories.detokenizer(prompt), completion)) == " a time"


def test_text_leaves_as_soon_as_it_is_certain() -> None:
    stories = ours("stories260K")
    ids = stories.encode_now("One day, a cat", add_special_tokens=False)
    assert all(deltas(stories.detokenizer(), ids)[:-1]), "plain text is never held back"


# ── Every decoder of the library ─────────────────────────────────────────────────────────────────

WORDS = [
    "[UNK]",
    "<s>",
    "</s>",
    "hello",
    "##ing",
    "##",
    "##'s",
    "world",
    ".",
    " .",
    ",",
    " ?",
    "n't",
    "a",
    "aa",
    " ",
    "  ",
    "▁",
    "▁▁",
    "▁new",
    "▁day",
    "x▁y",
    "▁.",
    "lo</w>",
    "w</w>",
    "</w>",
    "<",
    "/w>",
    "</",
    "|",
    "<pad>",
    "日本",
    "é",
    "Ġthe",
    "ĠĠ",
    "Ã",
    "©",
    "ðŁĺ",
    "Ģ",
    "Ċ",
    "",
    *(f"<0x{byte:02X}>" for byte in (*"é日😀a ▁".encode(), 0xFF, 0xC3)),
    "<0xzz>",
    "<0x1",
]
ANY = tokenizers.Regex
STEPS: list[Any] = [
    decoders.ByteLevel(),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.BPEDecoder(),
    decoders.WordPiece(),
    decoders.WordPiece("##", False),
    decoders.CTC(),
    decoders.Metaspace(),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.Metaspace(prepend_scheme="first"),
    decoders.Replace("▁", " "),
    decoders.Replace("aa", "b"),
    decoders.Replace("</w>", ""),
    decoders.Replace(ANY("^▁"), ""),
    decoders.Replace(ANY(r"\s+"), "_"),
    decoders.Strip(" ", 1, 0),
    decoders.Strip("▁", 2, 0),
]
SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
REAL: dict[str, Any] = {
    "none": None,
    "byte-level": decoders.ByteLevel(),
    "llama": decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(SENTENCEPIECE),
    "byte-fallback, metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace, byte-fallback": decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
    "metaspace": decoders.Metaspace(),
    "bpe": decoders.BPEDecoder(),
    "wordpiece": decoders.WordPiece(),
    "ctc": decoders.CTC(),
    "nested": decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()]),
    "strip at the end": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
}


def of_words(decoder: Any) -> tokenizers.Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    whole.add_special_tokens(["<s>", "</s>"])
    whole.add_tokens(["<plain>", "▁added"])
    if decoder is not None:
        whole.decoder = decoder
    return whole


@functools.cache
def real(name: str) -> tokenizers.Tokenizer:
    return of_words(REAL[name])


def check(whole: tokenizers.Tokenizer, ids: list[int], cut: int, skip: bool) -> None:
    special = {"<s>", "</s>"} if skip else set()

    def piece(token_id: int) -> str | None:
        known: str | None = whole.id_to_token(token_id)
        return None if known in special else known

    def decode(ids: list[int]) -> str:
        text: str = whole.decode(ids, skip_special_tokens=skip)
        return text

    decoder = Decoder(json.loads(whole.to_str())["decoder"], piece)
    stream = decoder.start()
    text = stream.push_all(ids[:cut])
    fork = stream.copy()  # the two go their own ways
    fork.push_all(ids)
    assert text + stream.push_all(ids[cut:]) + stream.finish() == decode(ids)

    continued = "".join(deltas(decoder.start(ids[:cut]), ids[cut:]))
    before = decode(ids[:cut])
    if decode(ids).startswith(before):
        assert before + continued == decode(ids)
    elif decode(ids).startswith(before.rstrip(REPLACEMENT)):  # a character of both is whole now
        assert decode(ids).endswith(continued)


IDS = st.lists(st.integers(0, len(WORDS) + 4), max_size=24)
USABLE = st.tuples(IDS, st.integers(0, 24), st.booleans())


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=100, deadline=None)
@given(case=USABLE)
def test_every_decoder_streams_what_it_decodes_at_once(name: str, case: tuple[list[int], int, bool]) -> None:
    if name == "strip at the end":  # the library panics on a text that is shorter than that
        case = ([3, *case[0]], 1 + case[1], case[2])
    check(real(name), *case)


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), case=USABLE)
def test_any_sequence_of_decoders_streams_what_it_decodes_at_once(
    steps: list[Any], case: tuple[list[int], int, bool]
) -> None:
    check(of_words(decoders.Sequence(steps)), *case)


def test_a_decoder_that_nobody_knows_is_an_error_at_start() -> None:
    with pytest.raises(UnsupportedModel, match="Telepathy"):
        Decoder({"type": "Telepathy"}, str)


def test_each_token_of_a_text_has_its_own_bytes() -> None:
    whole = of_words(decoders.WordPiece())
    decoder = Decoder(json.loads(whole.to_str())["decoder"], whole.id_to_token)
    ids = [WORDS.index(word) for word in ("hello", "##ing", "world", ".")]
    assert [decoder.token_bytes(i) for i in ids] == [b" hello", b"ing", b" world", b"."]


# ── Where a prompt ends inside a character ───────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "stories260K"])
@pytest.mark.parametrize("character", ["😀", "𒀀"])
def test_a_character_that_is_never_finished_stays_with_the_prompt(name: str, character: str) -> None:
    tokenizer = ours(name)
    first = tokenizer.encode_now("a", add_special_tokens=False)
    ids = tokenizer.encode_now("a" + character, add_special_tokens=False)
    after = tokenizer.encode_now("b", add_special_tokens=False)[-1:]
    for cut in range(len(first) + 1, len(ids)):
        text = "".join(deltas(tokenizer.detokenizer(ids[:cut]), after))
        assert theirs(name).decode(ids[:cut]) + text == theirs(name).decode(ids[:cut] + after)
        assert REPLACEMENT not in text
        assert "".join(deltas(tokenizer.detokenizer(ids[:cut]), ids[cut:])) == character


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_held_does_not_grow_with_the_text(name: str) -> None:
    ids = theirs(name).encode(TEXTS[0], add_special_tokens=False).ids
    stream = ours(name).detokenizer(ids * 100)
    for _ in range(100):
        stream.push_all(ids)
        held = [value for stage in stream._stages for value in vars(stage).values()]
        assert sum(len(value) for value in held if isinstance(value, (str, bytes))) < 16
