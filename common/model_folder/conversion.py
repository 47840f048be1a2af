"""A tokenizer for a folder that has none of today's form, from the files of an older one.

Owns: which files can be converted, and by which library. `vocab.json` with `merges.txt` is byte-level
BPE, which `tokenizers` builds by itself. `tokenizer.model` is SentencePiece's: transformers converts
it, in a process of its own (conversion_child.py), since it may bring torch along; the result is kept
in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from common.errors import CheckpointError, UnsupportedModel
from common.model_folder.reading import MAX_TOKENIZER_BYTES, is_int, read_bytes, read_object, read_text

VOCABULARY, MERGES, SENTENCEPIECE = "vocab.json", "merges.txt", "tokenizer.model"
END_OF_TEXT = "<|endoftext|>"
CACHE = "~/.cache/pdq/tokenizers"
TIMEOUT_S = 120.0
ADVICE = "save it once as tokenizer.json, with transformers' AutoTokenizer and save_pretrained"
CHILD = Path(__file__).with_name("conversion_child.py")

_GENERIC = ("", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
# How Qwen cuts text before byte pairs are merged: its tokenizer.json says the same.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONVERTED_FROM = (
    SENTENCEPIECE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def converted_tokenizer(folder: Path, config: Mapping[str, Any], model_type: str) -> str | None:
    """What `tokenizer.json` would say, from `vocab.json` and `merges.txt` or from
    `tokenizer.model`; None where the folder has neither. `config` is its `tokenizer_config.json`.
    Raises `ModelError`."""
    if (folder / VOCABULARY).exists() and (folder / MERGES).exists():
        text: str = _byte_level(folder, config, model_type).to_str()
        return text
    if (folder / SENTENCEPIECE).exists():
        return _sentencepiece(folder)
    return None


def _byte_level(folder: Path, config: Mapping[str, Any], model_type: str) -> tokenizers.Tokenizer:
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    generic = f"{kind}Fast" in _GENERIC or kind in _GENERIC
    if not generic and kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise UnsupportedModel(
            f"{folder}: a {kind:.60} cannot be made from {VOCABULARY} and {MERGES}; {ADVICE}",
            param="tokenizer_class",
        )
    path = folder / MERGES
    vocabulary, merges = _vocabulary(folder / VOCABULARY), _merges(path)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path} does not fit {VOCABULARY}: {error}", param=str(path)) from error
    space = config.get("add_prefix_space") is True
    if kind == "Qwen2Tokenizer" or (generic and model_type in ("qwen2", "qwen3")):
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    _add_ends(tokenizer, config)
    return tokenizer


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_object(path, required=True, limit=MAX_TOKENIZER_BYTES)
    for token, token_id in vocabulary.items():
        if not is_int(token_id) or not 0 <= token_id < 2**31:
            raise CheckpointError(
                f"{path}: {token!r:.60} has the id {token_id!r:.60}, which is none", param=str(path)
            )
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(path, MAX_TOKENIZER_BYTES).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(
                f"{path}: line {number} is no pair of tokens: {line!r:.60}", param=str(path)
            )
        pairs.append((left, right))
    return pairs


def _add_ends(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """What `add_bos_token` and `add_eos_token` ask for; a `tokenizer.json` says it by itself."""
    ends = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token") or END_OF_TEXT
        content = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if config.get(f"add_{end}_token") is True and token_id is not None:
            ends[end] = (content, token_id)
    if ends:
        single = [ends["bos"][0]] if "bos" in ends else []
        single += ["$A"] + ([ends["eos"][0]] if "eos" in ends else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(dict(ends.values()).items())
        )


def _sentencepiece(folder: Path) -> str:
    found = {
        name: read_bytes(folder / name, MAX_TOKENIZER_BYTES)
        for name in _CONVERTED_FROM
        if (folder / name).exists()
    }
    kept = Path(CACHE).expanduser() / f"{_key(found)}.json"
    if kept.is_file():
        return read_text(kept, MAX_TOKENIZER_BYTES)
    with tempfile.TemporaryDirectory(prefix="pdq-tokenizer-") as copy:
        # Only these files, so that nothing else in the folder has a say.
        for name, content in found.items():
            (Path(copy) / name).write_bytes(content)
        text = _run_child(folder, copy)
    _keep(kept, text)
    return text


def _run_child(folder: Path, copy: str) -> str:
    path = folder / SENTENCEPIECE
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(CHILD), copy],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(f"{path} cannot be converted: {error}", param=str(path)) from error
    if child.returncode:
        said = child.stderr.decode("utf-8", "replace").strip().splitlines() or ["it was ended"]
        raise CheckpointError(
            f"{path} cannot be converted: {said[-1]:.300}; install pdq[tokenizers], or {ADVICE}",
            param=str(path),
        )
    return child.stdout.decode()


def _key(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for library in ("transformers", "tokenizers"):
        try:
            digest.update(f"{library} {metadata.version(library)}\n".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"no {library}\n".encode())
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Put a result into the cache; where that cannot be, the next start converts it again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except (OSError, RuntimeError):  # a full disk, no home
        return
