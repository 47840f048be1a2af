"""The kinds of text that speculation is measured on.

Owns which prompts, model, draft model and proposers belong together, and why.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

LONGEST_TEXT = 3500  # characters of a prompt that is copied from: some 900 tokens
LETTERS = 16  # tokens that random text is made of
OPENINGS = (
    "Once upon a time, there was a little {} named {}.",
    "One day, a {} called {} went to the park.",
    "{1} was a happy {0}. {1} had",
    "The {} said to {}:",
    "A small {} and {} lived in",
    "{1} the {0} was sad because",
    "In the big forest, a {} met {}.",
    "It was a sunny day. The {} and {}",
)
HEROES = ("girl", "boy", "dog", "cat", "bear", "bird", "frog", "rabbit")
NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Sam")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Prompts as token ids, and the model, the draft model and the proposers that they are for."""

    name: str
    model: Path
    draft: Path | None
    proposers: tuple[str, ...]  # beside `off`
    temperatures: tuple[float, ...]
    prompts: tuple[tuple[int, ...], ...]
    allowed_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = True

    def some_prompts(self, count: int, first: int) -> list[tuple[int, ...]]:
        """`count` of them in order, from the one at `first`, round and round."""
        return [self.prompts[(first + index) % len(self.prompts)] for index in range(count)]


def stories(model: Path, draft: Path) -> Kind:
    """Stories by the model, drafts by one distilled from it."""
    every = ("ngram", "draft", "ngram+draft")
    return Kind("stories", model, draft, every, (0.0, 0.8), _openings(model))


def unrelated(model: Path, draft: Path, into: Path) -> Kind:
    """Stories again, with a draft model that knows nothing: its weights are shuffled."""
    shuffled = shuffle_weights(draft, into)
    return Kind("unrelated", model, shuffled, ("draft", "ngram+draft"), (0.0, 0.8), _openings(model))


def letters(model: Path) -> Kind:
    """Random tokens of a small alphabet: lookup always finds something, which is right once in sixteen."""
    rng = random.Random(0)
    alphabet = tuple(range(400, 400 + LETTERS))
    prompts = tuple(tuple(rng.choices(alphabet, k=32)) for _ in range(64))
    return Kind("letters", model, None, ("ngram",), (100.0,), prompts, alphabet)


def copied(model: Path, prompts: Path) -> Kind:
    """Text that repeats its prompt: summaries and answers from documents (Spec-Bench), edits of functions
    (HumanEval). Replies end where the model ends them."""
    questions = map(json.loads, (prompts / "spec_bench_question.jsonl").read_text().splitlines())
    texts: dict[str, list[str]] = {"summarization": [], "rag": []}
    for question in questions:
        if question["category"] in texts:
            texts[question["category"]].append(question["turns"][0])
    with gzip.open(prompts / "HumanEval.jsonl.gz", "rt") as lines:
        functions = [json.loads(line) for line in lines]
    edits = [
        "Repeat this function, and add a comment above its return statement.\n\n"
        f"```python\n{function['prompt']}{function['canonical_solution']}```"
        for function in functions
    ]
    fitting = [[text for text in of if len(text) <= LONGEST_TEXT] for of in (*texts.values(), edits)]
    turns = [text for group in zip(*fitting, strict=False) for text in group]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    shown = (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in turns)
    ids = tuple(tuple(tokenizer.encode(text).ids) for text in shown)
    return Kind("copied", model, None, ("ngram",), (0.0, 0.8), ids, ignore_eos=False)


def shuffle_weights(source: Path, into: Path) -> Path:
    """A model whose tensors have the elements of another's in any order."""
    generator = torch.Generator().manual_seed(0)
    into.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, into)
    shuffled = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        order = torch.randperm(tensor.numel(), generator=generator)
        shuffled[name] = tensor.flatten()[order].reshape(tensor.shape).contiguous()
    save_file(shuffled, into / "model.safetensors", metadata={"format": "pt"})
    return into


def _openings(model: Path) -> tuple[tuple[int, ...], ...]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    pairs: Sequence[tuple[str, str]] = [(hero, name) for hero in HEROES for name in NAMES]
    texts = [OPENINGS[index % len(OPENINGS)].format(*pair) for index, pair in enumerate(pairs)]
    random.Random(0).shuffle(texts)
    return tuple(tuple(tokenizer.encode(text).ids) for text in texts)
