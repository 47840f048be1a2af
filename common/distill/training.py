"""The draft learns what its target would say: gradient descent on the divergence of the two.

Owns the loss, the batches, and when a training ends. Knows nothing of files, nor of how lessons are made.

The loss is KL(target || draft) (Hinton et al. 2015) over the target's most likely tokens and all others
as one: forward, because a draft that has a little of everything the target may say is right more often
under shared noise than one that is sure of one thing.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.distill.network import Llama
from common.distill.optimization import descend, optimizers_of, set_rate, update_average
from common.distill.texts import AT_ONCE, Lesson
from common.errors import TrainingFailed

WEIGHT_DECAY = 0.02
LONG_SHARE = 0.1  # of the steps, where there are long rows
NO_LESS = 1e-6  # of a probability that is the difference of others


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """`minutes` None: as long as the steps take."""

    steps: int
    minutes: float | None
    batch_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """How a training stands."""

    step: int
    progress: float  # in [0, 1]
    loss: float  # nats per token, smoothed
    seconds: float
    tokens: int


def divergence(logits: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """KL in nats of each position: `logits` `[n, vocab]`, of the target `[n, kept]` each."""
    logits, wanted = logits.float(), logprobs.float()
    guessed = logits.gather(1, tokens.long()) - logits.logsumexp(-1, keepdim=True)
    known = (wanted.exp() * (wanted - guessed)).sum(-1)
    if tokens.shape[1] == logits.shape[1]:
        return known
    rest = (1 - wanted.exp().sum(-1)).clamp_min(NO_LESS)
    rest_guessed = (1 - guessed.exp().sum(-1)).clamp_min(NO_LESS)
    return known + rest * (rest.log() - rest_guessed.log())


def train(
    draft: Llama,
    short: Lesson,
    long: Lesson | None,
    how: Training,
    watch: Callable[[Moment], None],
    is_stopped: Callable[[], bool],
) -> dict[str, Tensor]:
    """The average of the weights on the way. Ends after the steps, the minutes, or when it is stopped.
    Raises `TrainingFailed` where the loss is no number."""
    device = draft.model.embed_tokens.weight.device
    average = {name: p.detach().clone() for name, p in draft.named_parameters()}
    optimizers = optimizers_of(draft, WEIGHT_DECAY)
    choice = random.Random(f"{how.seed}/training")
    draft.train()
    began, smooth, seen, progress, step = time.monotonic(), 0.0, 0, 0.0, 0
    while progress < 1.0 and not is_stopped():
        set_rate(optimizers, step, progress)
        lesson = long if long is not None and choice.random() < LONG_SHARE else short
        loss, tokens = _accumulate(draft, lesson, _some_rows(lesson, how.batch_tokens, choice), device)
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingFailed(f"the loss is {loss} after {step} steps: nothing was learned", param="loss")
        descend(draft, optimizers)
        update_average(average, draft, step)
        step, seen = step + 1, seen + tokens
        smooth += (loss - smooth) / min(step, 20)
        seconds = time.monotonic() - began
        progress = max(step / how.steps, seconds / 60 / how.minutes if how.minutes is not None else 0.0)
        watch(Moment(step, min(1.0, progress), smooth, seconds, seen))
    return average


def _some_rows(lesson: Lesson, batch_tokens: int, choice: random.Random) -> list[int]:
    rows, length = lesson.ids.shape
    return choice.sample(range(rows), min(rows, max(1, batch_tokens // length)))


def _accumulate(draft: Llama, lesson: Lesson, rows: Sequence[int], device: torch.device) -> tuple[float, int]:
    """Gradients of the mean loss over the tokens of `rows`, as many at once as memory is meant for: the loss,
    the tokens."""
    tokens = int(lesson.valid[rows].sum())
    at_once = max(1, AT_ONCE // (lesson.ids.shape[1] * draft.shape.vocab_size))
    total = 0.0
    for first in range(0, len(rows), at_once):
        part = list(rows[first : first + at_once])
        valid = lesson.valid[part]
        with torch.autocast(device.type, torch.bfloat16):
            logits = draft(lesson.ids[part].long().to(device))
        known = (lesson.tokens[part][valid].to(device), lesson.logprobs[part][valid].to(device))
        loss = divergence(logits[valid.to(device)], *known).sum() / tokens
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, tokens
