"""Text files to token windows: the held-out split, documents, conversations, the tokenizer.

Owns what a training token is: how files become documents, how a share of them becomes
conversations, the special tokens, and the order in which everything is shown. Everything is a pure
function of (files, seed, epoch), so a stopped run goes on with the same data. Knows nothing of
networks.

    document       <|bos|> text <|eos|>
    conversation   <|bos|> (<|system|> … <|end|>)? (<|user|> … <|end|> <|assistant|> … <|end|>)+
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

PAD, BOS, EOS, END = "<|pad|>", "<|bos|>", "<|eos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
# Their order is their id, from 0.
SPECIAL_TOKENS = (PAD, BOS, EOS, END, SYSTEM, USER, ASSISTANT)

CHARACTERS_PER_TOKEN = 3.0  # of this corpus with this tokenizer, for cutting to a length
HELD_OUT_BLOCK = 64  # units (paragraphs or speeches)
HELD_OUT_EVERY = 20  # blocks, so 5%
HELD_OUT_INDEX = 7

FILES = {"play": "tinyshakespeare", "tales": "grimms_fairy_tales", "speeches": "state_of_the_union"}

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Run:
    """Neighbouring paragraphs (or speeches) of one work, all on the same side of the split."""

    kind: str  # a key of FILES
    units: tuple[str, ...]
    held_out: bool

    def text(self) -> str:
        return "\n\n".join(self.units)


def _unwrap(paragraph: str) -> str:
    """One line per prose paragraph; verse (indented lines) stays as it is."""
    lines = paragraph.split("\n")
    if len(lines) > 1 and all(line.startswith(" ") for line in lines):
        return "\n".join(line.strip() for line in lines)
    return " ".join(line.strip() for line in lines)


def _units(kind: str, text: str) -> list[str]:
    units = [unit.strip("\n") for unit in re.split(r"\n\n+", text)]
    return [unit if kind == "play" else _unwrap(unit) for unit in units if unit.strip()]


def read_runs(text_dir: Path) -> list[Run]:
    """Every file as runs: 64 units of every 1,280 are held out; a tale never joins the next."""
    runs: list[Run] = []
    for kind, name in FILES.items():
        text = (text_dir / f"{name}.txt").read_text(encoding="utf-8")
        works = re.split(r"\n{5,}", text) if kind == "tales" else [text]
        index = 0
        current: list[str] = []
        for work in works:
            held_out = False
            for unit in _units(kind, work):
                side = index // HELD_OUT_BLOCK % HELD_OUT_EVERY == HELD_OUT_INDEX
                if side != held_out and current:
                    runs.append(Run(kind, tuple(current), held_out))
                    current = []
                held_out = side
                current.append(unit)
                index += 1
            if current:
                runs.append(Run(kind, tuple(current), held_out))
                current = []
    return runs


def train_tokenizer(runs: list[Run], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of the training side: every byte has a token, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one and a newline apart from what follows; otherwise the split of GPT-2.
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([run.text() for run in runs if not run.held_out], trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    return tokenizer


def render(messages: list[Message]) -> str:
    """A conversation as the model sees it; the chat template of the checkpoint does the same."""
    return BOS + "".join(f"<|{m['role']}|>{m['content'].strip()}{END}" for m in messages)


def passages(run: Run, choice: random.Random, shortest: int, longest: int) -> Iterator[tuple[str, ...]]:
    """Cut a run into groups of whole units, of log-uniformly drawn lengths in characters."""
    size = 0
    group: list[str] = []
    limit = shortest * (longest / shortest) ** choice.random()
    for unit in run.units:
        if group and size + len(unit) > limit:
            yield tuple(group)
            group, size = [], 0
            limit = shortest * (longest / shortest) ** choice.random()
        group.append(unit)
        size += len(unit) + 2
    if group:
        yield tuple(group)


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly assistant that answers in plain English.",
    "You answer in the words of old books.",
    "Be concise.",
)
CONTINUE = ("Continue this text: {}", "Please go on: {}", "{}", "{}", "What comes next? {}")
GO_ON = ("Go on.", "And then?", "Please continue.", "Tell me more.", "What happened next?")
ASK = {
    "play": (
        "Speak of {}.",
        "Write a few lines about {}.",
        "Write a short poem about {}.",
        "What do you say of {}?",
    ),
    "tales": (
        "Tell me a story about {}.",
        "Tell me a fairy tale with {} in it.",
        "Write a story about {}.",
        "What happened with {}?",
    ),
    "speeches": (
        "Tell me about {}.",
        "What do you think about {}?",
        "Why is {} important?",
        "Explain {}.",
        "Give a speech about {}.",
        "How can we improve {}?",
    ),
}


class Conversations:
    """Makes conversations of passages: the next speaker replies, or a question asks for a text."""

    def __init__(self, runs: list[Run]) -> None:
        units = [unit for run in runs for unit in run.units]
        self._rarity: dict[str, float] = {}
        counts = Counter(word for unit in units for word in set(self._words(unit)))
        for word, count in counts.items():
            # Words of one or two paragraphs teach nothing that holds for a third.
            self._rarity[word] = math.log(len(units) / count) if count >= 4 else 0.0

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\b[a-z]{4,}\b", text)

    def _topic(self, text: str) -> str | None:
        """The word that marks this text most, by term frequency times rarity."""
        counts = Counter(self._words(text))
        scored = [(n * self._rarity.get(word, 0.0), word) for word, n in counts.items()]
        return max(scored)[1] if scored else None

    def make(self, kind: str, units: tuple[str, ...], choice: random.Random) -> list[Message] | None:
        """Messages, the last one the assistant's; None where the passage does not suit."""
        if kind == "play" and len(units) >= 2 and choice.random() < 0.8:
            return self._dialogue(units, choice)
        if kind == "play":
            units = tuple(unit.partition(":\n")[2] or unit for unit in units)
        return self._question(kind, units, choice)

    def _dialogue(self, units: tuple[str, ...], choice: random.Random) -> list[Message] | None:
        turns = [unit.partition(":\n") for unit in units[: len(units) // 2 * 2]]
        if not all(separator and text.strip() for _, separator, text in turns):
            return None
        messages: list[Message] = []
        speakers = {name for name, _, _ in turns[1::2]}
        if len(speakers) == 1 and choice.random() < 0.5:
            messages.append({"role": "system", "content": f"You are {speakers.pop().title()}."})
        elif choice.random() < 0.3:
            messages.append({"role": "system", "content": choice.choice(SYSTEM_PROMPTS)})
        for index, (_, _, text) in enumerate(turns):
            messages.append({"role": ("user", "assistant")[index % 2], "content": text.strip()})
        return messages

    def _question(self, kind: str, units: tuple[str, ...], choice: random.Random) -> list[Message] | None:
        messages: list[Message] = []
        if choice.random() < 0.4:
            messages.append({"role": "system", "content": choice.choice(SYSTEM_PROMPTS)})
        first, topic = units[0], self._topic(units[0])
        if len(first) < 60:
            return None
        cuts = [match.end() for match in re.finditer(r"[.!?;:][’'\"]?\s", first)]
        if cuts and choice.random() < 0.5:
            cut = choice.choice(cuts)
            question, answer = choice.choice(CONTINUE).format(first[:cut].strip()), first[cut:]
        elif topic is not None:
            question, answer = choice.choice(ASK[kind]).format(topic), first
        else:
            return None
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer.strip()})
        for unit in units[1:]:
            messages.append({"role": "user", "content": choice.choice(GO_ON)})
            messages.append({"role": "assistant", "content": unit.strip()})
        return messages


def documents(
    runs: list[Run], choice: random.Random, shortest: int, longest: int, chat_share: float
) -> list[str]:
    """Every unit of `runs` once, in passages of `shortest` to `longest` tokens, shuffled."""
    conversations = Conversations(runs)
    texts: list[str] = []
    for run in runs:
        cut = passages(run, choice, int(shortest * CHARACTERS_PER_TOKEN), int(longest * CHARACTERS_PER_TOKEN))
        for units in cut:
            messages = None
            if choice.random() < chat_share:
                messages = conversations.make(run.kind, units, choice)
            texts.append(render(messages) if messages else BOS + "\n\n".join(units) + EOS)
    choice.shuffle(texts)
    return texts


class Stream:
    """Endless windows of one kind of documents; its place is two numbers, `epoch` and `offset`."""

    def __init__(
        self,
        runs: list[Run],
        tokenizer: Tokenizer,
        seed: int,
        shortest: int,
        longest: int,
        chat_share: float = 0.35,
    ) -> None:
        self._runs, self._tokenizer, self._seed = runs, tokenizer, seed
        self._lengths, self._chat_share = (shortest, longest), chat_share
        self.epoch, self.offset = 0, 0
        self._tokens = self._load()

    def _load(self) -> Tensor:
        choice = random.Random(f"{self._seed}/{self.epoch}/{self._lengths}")
        texts = documents(self._runs, choice, *self._lengths, self._chat_share)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return torch.tensor([token for one in encoded for token in one.ids])

    def seek(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset = epoch, offset
        self._tokens = self._load()

    def take(self, batch: int, length: int) -> Tensor:
        """The next `[batch, length + 1]` ids; neighbouring rows share one token."""
        if self.offset + batch * length + 1 > len(self._tokens):
            self.seek(self.epoch + 1, 0)
        piece = self._tokens[self.offset : self.offset + batch * length + 1]
        self.offset += batch * length
        return piece.unfold(0, length + 1, length)
