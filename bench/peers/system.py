"""What a measured system is to the client: prompts in, the moments of its tokens and its copies out.

Owns: the terms in which two different systems are compared, and the model that both are given.
Knows neither of them. All moments are `time.monotonic()` of the client.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from bench.engine import BODY
from common.commands.bench.client import Exchange, read

SERVED_NAME = "measured"


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What all systems serve: a config, weights (of `dummy` load format: random ones, made at load), and a
    tokenizer; and the size of the KV pool of each server."""

    folder: Path
    vocab_size: int
    kv_bytes_per_token: int
    pool_tokens: int
    load_format: str = "dummy"


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One answered request. `sent_at`: it was begun; `prefilled_at`: the client has what the prefill
    side answered; `user`: events with tokens, as the user gets them; `own`: those of the decode
    side."""

    sent_at: float
    prefilled_at: float
    user: tuple[float, ...]
    own: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """What the decode side pulled for one prompt: seconds it took, of these after the prompt was
    computed, and bytes."""

    seconds: float
    unhidden_s: float
    num_bytes: int


class System(Protocol):
    """One prefill and one decode server, one core each."""

    @property
    def name(self) -> str:
        """As the tables show it."""

    @property
    def prompt_tokens(self) -> int:
        """All that were sent since its processes began: they touched so much of the KV pools."""

    def processes(self) -> list[psutil.Process]:
        """All of them, while it is awake."""

    def awake(self) -> AbstractContextManager[None]:
        """Within it the system serves; outside of it it takes no CPU."""

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        """Greedy, and on beyond the end of sequence. Raises `RuntimeError` for an error."""

    async def copies(self, prompt_len: int) -> Copies:
        """Of the one prompt since the last call. `RuntimeError` if it was not handed over whole."""


def token_times(exchange: Exchange, wanted: int) -> tuple[float, ...]:
    """The moment of each token; `RuntimeError` for an error, and where tokens did not come as many as
    wanted and one by one."""
    answer = read(exchange)
    if answer.error:
        raise RuntimeError(f"{answer.error}: {answer.message}")
    if not answer.output_tokens == len(answer.token_times) == wanted:
        raise RuntimeError(f"{answer.output_tokens} tokens in {len(answer.token_times)} events, not {wanted}")
    return answer.token_times


def completion_body(prompt: Sequence[int], max_tokens: int, *, stream: bool) -> dict[str, object]:
    """The request that both systems get."""
    body: dict[str, object] = {
        "model": SERVED_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


def make_model(folder: Path, pool_tokens: int, *, checkpoint: bool = False) -> Model:
    """The 0.5B body's config, and a tokenizer in which every id of its vocabulary is a word, so that
    each token is text and hence an event. `checkpoint`: a file of random weights too, for an engine that
    cannot make its own."""
    shutil.copy(BODY / "config.json", folder)
    config = json.loads((BODY / "config.json").read_text())
    size: int = config["vocab_size"]
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    heads: int = config["num_key_value_heads"] * config["head_dim"]
    per_token = 2 * 2 * heads * int(config["num_hidden_layers"])  # K and V, two bytes each
    if checkpoint:
        _write_weights(folder)
    return Model(folder, size, per_token, pool_tokens)


def idle_cores(system: System, seconds: float) -> float:
    """Cores that an awake system takes while nothing is asked of it."""
    processes = system.processes()
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(seconds)
    return (sum(sum(process.cpu_times()[:2]) for process in processes) - before) / seconds


def _write_weights(folder: Path) -> None:
    """As transformers initializes them; nothing ends a reply but its length."""
    body = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    body.generation_config.eos_token_id = None
    body.save_pretrained(folder)
