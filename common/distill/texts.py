"""What a draft learns from: text that the target wrote, and how likely it found every token.

    write   beginnings ─▶ texts, by the target's engine
    score   texts ─▶ `Lesson`: rows of tokens, and after each the target's most likely ones

Owns how texts become rows. Only the most likely tokens are kept, and how much all others have together, so
that the target is computed once and a token takes the same memory with any vocabulary.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.distill.beginnings import Beginning, cycle
from common.engine.engine import Engine
from common.engine.interface import Chunks
from common.engine.runner.draft_step import logits_after
from common.engine.runner.loaded_model import LoadedModel
from common.errors import NotFiniteLogits
from common.sampling import SamplingParams

KEPT = 64  # most likely tokens after each
BYTES_KEPT = 6  # of each of them: its id and its log probability
LEAST_REPLY = 4  # a text's share that the target writes is at least one in so many
AT_ONCE = 2**24  # logits that are computed together, as numbers of float32

Progress = Callable[[int], None]  # of texts or rows that are done


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    prompt: Beginning
    reply: tuple[int, ...]
    temperature: float
    seed: int

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.reply


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """Rows of whole texts, one after the other, filled up with padding."""

    ids: Tensor  # int32 [rows, length]
    valid: Tensor  # bool [rows, length]: no padding
    tokens: Tensor  # int32 [rows, length, kept]: the most likely ones to come next
    logprobs: Tensor  # float16 [rows, length, kept]: theirs, at temperature 1


def write(
    engine: Engine,
    beginnings: Sequence[Beginning],
    count: int,
    length: int,
    temperatures: Sequence[float],
    seed: int,
    progress: Progress,
) -> list[Text]:
    """`count` texts of about `length` tokens, each with its own noise; equal ones once."""
    choice = random.Random(f"{seed}/texts")
    longest = engine.facts.max_model_len - max(1, length // LEAST_REPLY)
    some = itertools.islice(cycle(beginnings, choice), count)
    prompts = [beginning[: max(1, longest)] for beginning in some]
    kinds = [choice.choice(list(temperatures)) for _ in range(count)]
    texts: dict[tuple[int, ...], Text] = {}
    group = 4 * 64
    for first in range(0, count, group):
        part = range(first, min(count, first + group))
        params = [
            SamplingParams(
                max_tokens=max(length - len(prompts[i]), length // LEAST_REPLY, 1),
                temperature=kinds[i],
                seed=seed * 2**32 + i,
            )
            for i in part
        ]
        written = engine.generate([prompts[i] for i in part], params)
        for i, reply, wanted in zip(part, written, params, strict=True):
            text = Text(prompts[i], reply.token_ids, kinds[i], wanted.seed)
            texts.setdefault(text.ids, text)
        progress(part.stop)
    return list(texts.values())


def packed(texts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Texts in as few rows of at most `length` as first-fit finds, longest first; longer ones are cut."""
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (free places, row), ascending
    for text in sorted((text[:length] for text in texts), key=len, reverse=True):
        at = bisect.bisect_left(by_room, (len(text), -1))
        if at == len(by_room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = by_room.pop(at)
        rows[row].extend(text)
        bisect.insort(by_room, (free - len(text), row))
    return rows


def score(runner: LoadedModel, rows: Sequence[Sequence[int]], length: int, progress: Progress) -> Lesson:
    """`rows` as the target sees them. The runner's engine must be idle and without cached blocks: its pool
    is written over."""
    kept = min(KEPT, runner.facts.vocab_size)
    shape = (len(rows), length)
    ids, valid = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    tokens = torch.zeros((*shape, kept), dtype=torch.int32)
    logprobs = torch.zeros((*shape, kept), dtype=torch.float16)
    for row, start, logits in _logits(runner, rows):
        n = logits.shape[0]
        if not torch.isfinite(logits).all():
            raise NotFiniteLogits("the target gives NaN or infinity for its own text: nothing can be learned")
        found = logits.log_softmax(-1).topk(kept)
        tokens[row, start : start + n] = found.indices.int().cpu()
        logprobs[row, start : start + n] = found.values.half().cpu()
        if start == 0:
            ids[row, : len(rows[row])] = torch.tensor(rows[row], dtype=torch.int32)
            valid[row, : len(rows[row])] = True
        progress(row + 1)
    return Lesson(ids, valid, tokens, logprobs)


def _logits(runner: LoadedModel, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Tensor]]:
    """(row, first position, float32 logits `[positions, vocab]`), in order."""
    size, at_once = runner.facts.layout.block_size, max(1, AT_ONCE // runner.facts.vocab_size)
    for row, ids in enumerate(rows):
        for start in range(0, len(ids), at_once):
            chunks = Chunks.of_prompt(ids[start : start + at_once], size, start)
            runner.backend.enter_thread()
            logits = logits_after(runner.model, runner.backend, chunks, chunks.lengths, runner.cache)
            yield row, start, logits.float()
