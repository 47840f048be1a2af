"""Sampling parameters of one request, validated once; and the reasons a sequence ends.

Owns: the names, ranges and defaults of what a user may ask of the sampler. Knows nothing of
tensors, HTTP or strings: stop *strings* belong to the gateway, stop *ids* are here.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from common.errors import InvalidRequest

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is what OpenAI's API calls it."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """What shapes the choice of the next token.

    The token at a position is a pure function of that position's logits, these parameters, the
    tokens before it, and the key (`seed`, choice, absolute position).

    Order of application, as in vLLM: logit_bias and allowed/banned ids, penalties, temperature,
    min_p, top_k, top_p. `logprobs` are those of the model's own logits, before all of that.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives; 0 gives the chosen token's only
    prompt_logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, wanted: str) -> None:
            if not condition:
                raise InvalidRequest(f"{field} must be {wanted}, got {getattr(self, field)!r}", param=field)

        require(self.max_tokens >= 1, "max_tokens", "at least 1")
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        for field in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            require(math.isfinite(getattr(self, field)), field, "a finite number")
        require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        require(0 <= self.top_k < 2**31, "top_k", "0 (all) or positive")
        require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        require(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        # Beyond, a float32 logit may overflow.
        require(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", "in [0.01, 100]")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        require(
            all(i >= 0 and math.isfinite(b) and -100.0 <= b <= 100.0 for i, b in self.logit_bias),
            "logit_bias",
            "token ids with a bias between -100 and 100",
        )
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "absent or not empty",
        )
        require(
            self.allowed_token_ids is None or not set(self.allowed_token_ids) <= set(self.banned_token_ids),
            "allowed_token_ids",
            "ids of which banned_token_ids leave one",
        )
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            require(value is None or 0 <= value <= MAX_LOGPROBS, field, f"between 0 and {MAX_LOGPROBS}")
        require(0 <= self.seed <= MAX_SEED, "seed", "an unsigned 64-bit integer")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` when a token id named here is outside `[0, vocab_size)`."""
        named = {
            "logit_bias": tuple(i for i, _ in self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "banned_token_ids": self.banned_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        for field, ids in named.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"{field} names token id {token}, the vocabulary has {vocab_size}", param=field
                    )

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that a sequence has already change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
