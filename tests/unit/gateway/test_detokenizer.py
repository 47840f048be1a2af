"""The detokenizer never emits half a character, and its deltas are the whole text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model_folder.description import describe_model
from gateway.detokenizer import REPLACEMENT, Detokenizer, decoder_for
from gateway.tokenizer import Tokenizer

MODELS = Path(__file__).parents[4] / "shared" / "models"
FOLDERS = ["tokenizers/gpt2", "tokenizers/qwen2", "stories260K", "babyllama361"]
LOADED = {name: Tokenizer(describe_model(MODELS / name)) for name in FOLDERS}
WHOLE = {
    name: tokenizers.Tokenizer.from_file(str(MODELS / name / "tokenizer.json")) for name in FOLDERS
}
TEXTS = [
    "Once upon a time, there was a  little girl.\n\tShe  smiled.",
    "naïve café – “quotes” … €",
    "你好，世界！👩‍👩‍👧‍👦🏳️‍🌈 नमस्ते สวัสดี",
    " leading and trailing ",
]


def deltas(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_of_random_ids_are_the_text_of_all_ids(name: str, data: st.DataObject) -> None:
    size = LOADED[name].model.vocab_size
    any_id = st.integers(0, size + 5) | st.integers(0, min(size, 300))  # low ids: bytes, specials
    ids = data.draw(st.lists(any_id, max_size=60))
    assert "".join(deltas(LOADED[name].detokenizer(), ids)) == WHOLE[name].decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(TEXTS), cut=st.integers(0, 60))
def test_a_completion_continues_its_prompt(name: str, text: str, cut: int) -> None:
    whole = WHOLE[name]
    ids = whole.encode(text, add_special_tokens=False).ids
    prompt, completion = ids[:cut], ids[cut:]
    if REPLACEMENT in whole.decode(prompt) or not text.startswith(whole.decode(prompt)):
        return  # cut inside a character, or the normalizer changed the text
    continued = "".join(deltas(LOADED[name].detokenizer(prompt), completion))
    assert whole.decode(prompt) + continued == whole.decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_holds_half_a_character(name: str, text: str) -> None:
    ids = WHOLE[name].encode(text, add_special_tokens=False).ids
    assert not any(REPLACEMENT in delta for delta in deltas(LOADED[name].detokenizer(), ids))


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    gpt2 = LOADED["tokenizers/gpt2"]
    ids = gpt2.encode_now("a😀")
    assert len(ids) > 2
    assert deltas(gpt2.detokenizer(), ids[:-1])[-1] == REPLACEMENT


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    gpt2 = LOADED["tokenizers/gpt2"]
    ids = gpt2.encode_now("a𒀀b")  # a character of several tokens
    assert len(ids) > 4
    for cut in range(2, len(ids) - 1):
        assert "".join(deltas(gpt2.detokenizer(ids[:cut]), ids[cut:])) == "𒀀b"


def test_the_space_of_the_first_word_belongs_to_the_completion() -> None:
    stories = LOADED["stories260K"]
    prompt = stories.encode_now("Once upon")
    completion = stories.encode_now("a time", add_special_tokens=False)
    assert stories.decode(completion) == "a time"
    assert "".join(deltas(stories.detokenizer(prompt), completion)) == " a time"


def test_text_leaves_as_soon_as_it_is_certain() -> None:
    stories = LOADED["stories260K"]
    ids = stories.encode_now("One day, a cat", add_special_tokens=False)
    assert all(deltas(stories.detokenizer(), ids)[:-1]), "plain text is never held back"


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "none"])
def test_other_decoders_go_through_a_window(kind: str) -> None:
    words = ["[UNK]", "hello", "##ing", "world", ".", ",", "▁new", "▁day", "a"]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]")
    whole = tokenizers.Tokenizer(model)
    if kind == "wordpiece":
        whole.decoder = tokenizers.decoders.WordPiece()
    elif kind == "metaspace":
        whole.decoder = tokenizers.decoders.Metaspace()
    decoder = decoder_for({"type": kind}, whole.id_to_token, whole.decode)
    for ids in ([1, 2, 3, 4], [3, 5, 1, 4, 4, 3], [6, 7, 8, 6, 7], [1] * 50 + [2] * 50):
        assert "".join(deltas(decoder.start(), ids)) == whole.decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
def test_cost_per_token_does_not_grow_with_the_text(name: str) -> None:
    """Twenty times the tokens may not cost more than about twenty times the time."""
    ids = WHOLE[name].encode(TEXTS[0] * 10, add_special_tokens=False).ids

    def seconds(repeats: int) -> float:
        many = ids * repeats
        detokenizer = LOADED[name].detokenizer()
        begin = time.perf_counter()
        for token_id in many:
            detokenizer.push(token_id)
        return time.perf_counter() - begin

    seconds(1)
    short = min(seconds(20) for _ in range(3))
    long = min(seconds(400) for _ in range(3))
    assert long < 20 * short * 4
