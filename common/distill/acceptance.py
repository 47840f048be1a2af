"""How often a draft is right, and what that is worth.

Owns both measures, on beginnings that were held out:

- Acceptance by the rule of serving: a draft is right where the draft model, sampling with the noise of the
  position, chooses the token that the target chose. All drafts before a token were right when it counts, so
  the draft model is computed once over the text that the target wrote, and every step that speculation
  would make is read from where the two agree.
- Speed of two engines, one with the draft and one without, in turns.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.distill.beginnings import Beginning
from common.distill.texts import Text
from common.engine.engine import Engine
from common.engine.interface import Chunks
from common.engine.runner.draft_step import logits_after
from common.engine.runner.loaded_model import LoadedModel
from common.engine.sampling.records import SampleRows
from common.sampling import SamplingParams

DRAFTED = 8  # tokens of a step, as in `num_speculative_tokens`
TURNS = 3  # of each engine, after one to warm up
TIMED_TOKENS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Acceptance:
    """`by_position[i]`: the share of steps whose first `i + 1` drafts are right, with `DRAFTED` in each."""

    temperature: float
    tokens: int
    equal: float  # share of all tokens that the draft model would have chosen, too
    by_position: tuple[float, ...]
    tokens_per_step: float


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Output tokens per second of one stream."""

    temperature: float
    off: float
    draft: float
    same: bool  # all tokens

    @property
    def ratio(self) -> float:
        return self.draft / self.off


def acceptance(draft: LoadedModel, texts: Sequence[Text], temperature: float) -> Acceptance:
    """Of replies that the target wrote at this temperature. `draft` is a runner of the draft model alone, its
    pool unused."""
    agreed = [_agreement(draft, text) for text in texts if text.reply]
    reached, steps, tokens = np.zeros(DRAFTED, np.int64), 0, 0
    for equal in agreed:
        at = 0
        while at < len(equal):
            wrong = np.flatnonzero(~equal[at : at + DRAFTED])
            right = int(wrong[0]) if len(wrong) else min(DRAFTED, len(equal) - at)
            reached[:right] += 1
            steps, at = steps + 1, at + right + 1
        tokens += len(equal)
    total = max(1, tokens)
    return Acceptance(
        temperature,
        tokens,
        sum(int(equal.sum()) for equal in agreed) / total,
        tuple((reached / max(1, steps)).tolist()),
        tokens / max(1, steps),
    )


def _agreement(draft: LoadedModel, text: Text) -> NDArray[np.bool_]:
    """`[reply]`: whether the draft model chooses this token."""
    known = min(len(text.ids), draft.facts.max_model_len)
    first = len(text.prompt)
    if known <= first:
        return np.zeros(len(text.reply), np.bool_)
    what_it_follows = text.ids[: known - 1]
    chunks = Chunks.of_prompt(what_it_follows, draft.facts.layout.block_size)
    count = known - first
    logits = logits_after(draft.model, draft.backend, chunks, np.array([count]), draft.cache)
    params = SamplingParams(temperature=text.temperature, seed=text.seed)
    draft.sampler.add(0, params, 0, (), (), prompt_len=first)
    try:
        rows = SampleRows(slots=np.zeros(count, np.int64), positions=np.arange(first, known))
        chosen = draft.sampler.sample(logits, rows).token_ids
    finally:
        draft.sampler.remove(0)
    equal = np.zeros(len(text.reply), np.bool_)
    equal[:count] = chosen == text.reply[:count]
    return equal


def speeds(
    target: Path, draft: Path, prompts: Sequence[Beginning], temperatures: Sequence[float], **settings: object
) -> list[Speed]:
    """One stream after the other through both engines; medians of the turns."""
    off = Engine.load(target, **settings)
    on = Engine.load(target, speculative="draft", speculative_model=str(draft), **settings)
    for engine in (off, on):
        engine.warm_up()
    found = []
    for temperature in temperatures:
        rates: dict[Engine, list[float]] = {off: [], on: []}
        same = True
        for turn in range(1 + TURNS):
            replies = []
            for engine in (off, on) if turn % 2 else (on, off):
                seconds, reply = _timed(engine, prompts, temperature, turn)
                replies.append(reply)
                if turn:
                    rates[engine].append(sum(map(len, reply)) / seconds)
            same &= replies[0] == replies[1]
        found.append(Speed(temperature, float(np.median(rates[off])), float(np.median(rates[on])), same))
    return found


def _timed(
    engine: Engine, prompts: Sequence[Beginning], temperature: float, turn: int
) -> tuple[float, list[tuple[int, ...]]]:
    began, replies = time.perf_counter(), []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=TIMED_TOKENS, temperature=temperature, seed=1000 * turn + index, ignore_eos=True
        )
        replies += [reply.token_ids for reply in engine.generate([prompt], params)]
    return time.perf_counter() - began, replies
