"""When a prompt is offered: as late as its transfer still hides behind the compute that is left.

Owns how long prompt tokens take here, of the last steps. From its offer on, room for all of a prompt waits at
the decode node, where others could use it; once it is offered, what is computed is copied while the rest is
computed. An estimate that is too long costs the reply's second token the part of the transfer that was not
hidden; one that is too short, room.
"""

from __future__ import annotations

import math

from common.engine.core.step import Chunk, Step

ANSWER_S = 0.1  # from an offer to the first copy, at a busy node
BYTES_PER_S = 125e6  # of a slow link: a gigabit
MEMORY = 0.9  # of what earlier steps took, after each further one


class OfferTimes:
    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._seconds = self._tokens = 0.0  # of the last steps, older ones count less

    def took(self, step: Step, seconds: float) -> None:
        """What a step with prompts took."""
        if step.num_prompt_tokens:
            self._seconds = MEMORY * self._seconds + seconds
            self._tokens = MEMORY * self._tokens + step.num_tokens

    def until_due(self, step: Step, chunk: Chunk, length: int) -> float:
        """Seconds from the start of a step until the prompt of `length`, of which it computes `chunk`, is to
        be offered; infinity: not in this step. At once while nothing is known."""
        if not self._tokens:
            return 0.0
        token_s = self._seconds / self._tokens
        step_s = token_s * step.num_tokens
        left_s = step_s + token_s * (length - chunk.end)
        due_s = max(0.0, left_s - ANSWER_S - length * self._bytes_per_token / BYTES_PER_S)
        return due_s if due_s < step_s else math.inf
