"""The tokenizer of a model's folder, with everything that stands about tokens in other files.

Owns: which files say what about tokens, and which of them holds. `tokenizer.json` decides how text
becomes ids; `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` may add
tokens to it and say which are special. Truncation, padding and dropout that somebody saved in it
are switched off. The digest covers all of it. Knows nothing of chat templates or of weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import CheckpointError, UnsupportedModel
from common.model_folder.conversion import converted_tokenizer
from common.model_folder.reading import MAX_TOKENIZER_BYTES, is_int, read_object, read_text, section, wrong

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
_NAMED = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FURTHER = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """A tokenizer that is complete; `special_tokens` has `bos_token`, `eos_token`, … as text."""

    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]

    @property
    def eos_token_id(self) -> int | None:
        name = self.special_tokens.get("eos_token")
        found: int | None = None if name is None else self.tokenizer.token_to_id(name)
        return found


def load_tokenizer(
    folder: Path, config: Mapping[str, Any], model_type: str, vocab_size: int | None
) -> FolderTokenizer | None:
    """The tokenizer of `folder`, whose `tokenizer_config.json` is `config`; None without one. Files
    of an older form are converted where `tokenizer.json` is missing (conversion.py).

    A token beyond `vocab_size` (the rows of the embedding) is not added: the model could not
    read it. Raises `ModelError`.
    """
    if config.get("split_special_tokens"):
        raise UnsupportedModel(
            f"{CONFIG}: split_special_tokens is not supported: what a chat's template writes could "
            "not be told from what is said",
            param="split_special_tokens",
        )
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        text: str | None = read_text(path, MAX_TOKENIZER_BYTES)
    else:
        text = converted_tokenizer(folder, config, model_type)
    if text is None:
        return None
    tokenizer = parse_tokenizer(text, str(path))
    named, extra = _special_tokens(folder, config)
    added = _added_tokens(folder, config, named, extra)
    _complete(tokenizer, added, [*named.values(), *extra], vocab_size)
    return FolderTokenizer(tokenizer, {name: token.content for name, token in named.items()})


def parse_tokenizer(text: str, file: str) -> tokenizers.Tokenizer:
    """A tokenizer from its JSON, that never cuts, fills up or rolls dice."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, and a panic is not even that
        raise CheckpointError(f"{file} is no tokenizer: {error}", param=file) from error
    for token in json.loads(text).get("added_tokens") or ():
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"] and token["content"]:
            # The library gives another one by itself, and prints a warning.
            raise CheckpointError(
                f"{file} gives the token {token['content']!r:.60} the id {token['id']}, but there "
                f"it can only have {found}",
                param=file,
            )
    return tokenizer


def tokenizer_digest(tokenizer: tokenizers.Tokenizer, stop_token_ids: Sequence[int]) -> str:
    """32 hex digits over all that decides which ids a text has, which text ids have, and where a
    sequence stops. Equal for files that say the same in different ways."""
    content = json.loads(tokenizer.to_str())
    for field in ("version", "truncation", "padding"):
        content.pop(field, None)
    model = content.pop("model")
    vocabulary, merges = model.pop("vocab", []), model.pop("merges", [])
    if isinstance(vocabulary, dict):
        vocabulary = sorted(vocabulary.items(), key=operator.itemgetter(1))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    settings = _without_defaults([content, model])
    digest = hashlib.blake2b(digest_size=16)
    for part in (vocabulary, pairs, settings, sorted(stop_token_ids)):
        digest.update(json.dumps(part, sort_keys=part is settings).encode())
    return digest.hexdigest()


def _without_defaults(value: Any) -> Any:
    """What a newer library writes and an older one leaves out is null or false."""
    if not isinstance(value, dict):
        return [_without_defaults(v) for v in value] if isinstance(value, list) else value
    return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}


def _complete(
    tokenizer: tokenizers.Tokenizer,
    added: Mapping[int, tokenizers.AddedToken],
    special: Sequence[tokenizers.AddedToken],
    vocab_size: int | None,
) -> None:
    """Add what is missing, and give what is known the properties that `added` says.

    The id of a known token is the one that `tokenizer.json` says. A new one gets the next free
    id; if it ought to have another, the model has learned another, and that is an error.
    """
    known = tokenizer.get_added_tokens_decoder()
    names = {token.content: token for token in known.values()}
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    free = max(size, max(known, default=-1) + 1)
    tokens: list[tokenizers.AddedToken] = []
    for token_id, token in [*sorted(added.items()), *((None, token) for token in special)]:
        if not token.content:
            continue
        if token_id is None and token.content in names:
            token = names[token.content]  # with its own flags
            if token.special:
                continue
            token.special = True
        if tokenizer.token_to_id(token.content) is None and token.content not in names:
            if vocab_size is not None and (free if token_id is None else token_id) >= vocab_size:
                continue
            if token_id is not None and token_id != free:
                raise CheckpointError(
                    f"token {token.content!r:.60} has the id {token_id} in added_tokens_decoder of "
                    f"{CONFIG} or in {ADDED}, but the next one that tokenizer.json leaves is {free}",
                    param="added_tokens_decoder",
                )
            free += 1
        names[token.content] = token
        tokens.append(token)
    if tokens:
        tokenizer.add_tokens(tokens)


def _special_tokens(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, tokenizers.AddedToken], list[tokenizers.AddedToken]]:
    """`bos_token` and the like by name, and further special tokens, as transformers finds them:
    `special_tokens_map.json` is older, and holds where `added_tokens_decoder` is missing; otherwise
    it fills in what `tokenizer_config.json` does not say. Null says nothing."""
    table = read_object(folder / MAP)
    sources = [(config, CONFIG), (table, MAP)]
    if not config.get("added_tokens_decoder"):
        sources.reverse()
    named: dict[str, tokenizers.AddedToken] = {}
    extra: dict[str, tokenizers.AddedToken] = {}
    for source, file in sources:
        for field, value in source.items():
            if field in _FURTHER:
                for name, entry in _entries(value, field, file):
                    token = _token(entry, field, file)
                    if name is not None:
                        named.setdefault(name, token)
                    else:
                        extra.setdefault(token.content, token)
            elif value and (field in _NAMED or _is_token(field, value)):
                named.setdefault(field, _token(value, field, file))
    return named, list(extra.values())


def _is_token(field: str, value: Any) -> bool:
    """Some models have names of their own; `add_bos_token` and the like are flags."""
    return field.endswith("_token") and isinstance(value, str | dict)


def _entries(value: Any, field: str, file: str) -> Iterator[tuple[str | None, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((None, entry) for entry in value)
    elif value is not None:
        raise wrong(file, field, "a list of tokens", value)


def _added_tokens(
    folder: Path,
    config: Mapping[str, Any],
    named: Mapping[str, tokenizers.AddedToken],
    extra: Sequence[tokenizers.AddedToken],
) -> dict[int, tokenizers.AddedToken]:
    """Tokens by id that were added to the vocabulary after training."""
    found: dict[int, tokenizers.AddedToken] = {}
    decoder = section(config, "added_tokens_decoder", CONFIG)
    for key, value in decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise wrong(CONFIG, "added_tokens_decoder", "an object with token ids as keys", key)
        found[int(key)] = _token(value, f"added_tokens_decoder.{key}", CONFIG)
    if not decoder:
        special = {token.content: token for token in (*extra, *named.values())}
        for content, token_id in read_object(folder / ADDED).items():
            if not is_int(token_id) or token_id < 0:
                raise wrong(ADDED, content[:100], "a token id", token_id)
            found[token_id] = special.get(content) or tokenizers.AddedToken(content)
    return found


def _token(value: Any, field: str, file: str) -> tokenizers.AddedToken:
    """A token is its text, or an object with `content` and flags."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise wrong(file, field, "a token", value)
    flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise wrong(file, field, "a token whose flags are true or false", value)
    if not field.startswith("added_tokens_decoder"):
        flags["special"] = True
    return tokenizers.AddedToken(value["content"], **flags)
