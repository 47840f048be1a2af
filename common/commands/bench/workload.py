"""What the load consists of: when requests arrive, how long they are, and what they say.

Owns: all of it as pure functions of the seed, so that two runs, or two servers, get the same
requests. Prompts are fresh, so that no prefix cache helps, beyond `--shared-prefix`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import ConfigError

PROMPT_COLUMNS = ("ContextTokens", "input_length", "prompt_size", "prompt_len", "prompt_tokens")
OUTPUT_COLUMNS = ("GeneratedTokens", "output_length", "token_size", "output_len", "output_tokens")

_WORDS = (
    "the king and his daughter went into a great forest where there was an old house by river "
    "stone night came with wind rain so that they could not see way home said little fox who had "
    "been listening if you will give me your golden ring I shall show road but must never tell "
    "anyone what have seen here then took sword horse rode over seven hills until morning sun "
    "rose people of town stood at gate asked why bread was dear winter long war peace nation "
    "congress law right work year honest labor country one two three upon time once again good"
)
WORDS = tuple(_WORDS.split(" "))


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request to make. `due_s` counts from the start; 0 in a closed loop."""

    index: int
    due_s: float
    prompt: list[int] | str
    prompt_len: int  # as wanted; the server says what it was
    output_len: int


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where prompts come from: ids, or words and how many tokens one of them is."""

    ids: Sequence[int] = ()
    words: Sequence[str] = ()
    tokens_per_word: float = 1.0

    def draw(self, count: int, rng: random.Random) -> list[int] | list[str]:
        """About `count` tokens, as ids or as words."""
        if self.ids:
            return rng.choices(self.ids, k=count)
        wanted = max(1, round(count / self.tokens_per_word))
        if self.words is WORDS or len(self.words) <= wanted:
            return rng.choices(self.words, k=wanted)
        start = rng.randrange(len(self.words) - wanted)
        return list(self.words[start : start + wanted])


def arrivals(count: int, rate: float | None, rng: random.Random) -> list[float]:
    """Moments of a Poisson process, in seconds from the start; all 0 without a rate."""
    if rate is None:
        return [0.0] * count
    moments, now = [], 0.0
    for _ in range(count):
        moments.append(now)
        now += rng.expovariate(rate)
    return moments


def read_trace(path: Path) -> list[tuple[int, int]]:
    """(prompt, output) lengths of a CSV or JSONL file with columns as the known traces name them.
    `ConfigError` if there are none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: Iterable[dict[str, object]]
            if path.suffix in (".jsonl", ".json"):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file))
        lengths = [
            (int(float(str(prompt))), int(float(str(output))))
            for row in rows
            if (prompt := _first(row, PROMPT_COLUMNS)) and (output := _first(row, OUTPUT_COLUMNS))
        ]
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}", param="trace") from error
    lengths = [pair for pair in lengths if min(pair) > 0]
    if not lengths:
        raise ConfigError(
            f"{path} has no lengths: a column of {', '.join(PROMPT_COLUMNS)} and one of "
            f"{', '.join(OUTPUT_COLUMNS)} are needed",
            param="trace",
        )
    return lengths


def draw_lengths(
    trace: Sequence[tuple[int, int]], count: int, scale: float, rng: random.Random
) -> list[tuple[int, int]]:
    """Pairs of the trace at random, none twice before all were taken."""
    drawn: list[tuple[int, int]] = []
    while len(drawn) < count:
        drawn += rng.sample(trace, min(len(trace), count - len(drawn)))
    return [(max(1, round(p * scale)), max(1, round(o * scale))) for p, o in drawn]


def fit(lengths: Sequence[tuple[int, int]], longest: int | None) -> tuple[list[tuple[int, int]], int]:
    """Lengths that the context of `longest` tokens can take, and how many had to be cut."""
    if longest is None:
        return list(lengths), 0
    fitted = []
    for prompt, output in lengths:
        output = min(output, longest - 1)
        fitted.append((min(prompt, longest - output), output))
    return fitted, sum(a != b for a, b in zip(lengths, fitted, strict=True))


def make_jobs(
    source: Source,
    lengths: Sequence[tuple[int, int]],
    moments: Sequence[float],
    shared_prefix: int,
    rng: random.Random,
) -> list[Job]:
    """Prompts are drawn in order, the shared prefix first."""
    longest = max((prompt for prompt, _ in lengths), default=0)
    prefix = source.draw(min(shared_prefix, longest), rng) if shared_prefix else []
    prefix_len = min(shared_prefix, longest)
    jobs = []
    for index, ((prompt_len, output_len), due_s) in enumerate(zip(lengths, moments, strict=True)):
        fresh = prompt_len - prefix_len
        parts = [*prefix, *(source.draw(fresh, rng) if fresh > 0 else [])]
        if fresh < 0:
            parts = parts[: max(1, len(parts) * prompt_len // prefix_len)]
        prompt: list[int] | str
        if source.ids:
            prompt = [part for part in parts if isinstance(part, int)]
        else:
            prompt = " ".join(map(str, parts))
        jobs.append(Job(index, due_s, prompt, prompt_len, output_len))
    return jobs


def _first(row: dict[str, object], names: Sequence[str]) -> object:
    return next((row[name] for name in names if row.get(name)), None)
