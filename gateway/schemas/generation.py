"""The fields of completions and chat completions alike, and their way to `SamplingParams`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from common.errors import InvalidRequest
from common.model_folder.generation import SamplingDefaults
from common.sampling import MAX_SEED, SamplingParams
from gateway.schemas.fields import Fields, given

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_CACHE_SALT = 256
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_IDS = 16_384  # of one list
MAX_PRIORITY = 2**31 - 1


Ids = Annotated[list[int], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]


@dataclasses.dataclass(frozen=True, slots=True)
class TextOptions:
    """How the tokens of an answer become the text that the client sees."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False  # a stop string, or the text of the token that ends, is shown
    skip_special_tokens: bool = True


class StreamOptions(Fields):
    no_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(Fields):
    """What both endpoints share."""

    no_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "session_id",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "spaces_between_special_tokens",  # for the slow tokenizers of transformers
        }
    )
    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "response_format": ({"type": "text"},),
        "moderation": (),
        # vLLM's
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "watermarking": (False,),
        "prompt_logprobs": (),
        "logprob_token_ids": (),
        "bad_words": (),
        "logits_processors": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "structural_tag": (),
        # what constrains the output elsewhere: SGLang's and llama.cpp's
        "regex": (),
        "ebnf": (),
        "grammar": (),
        "json_schema": (),
        "stop_regex": (),
        "lora_path": (),
        "structured_outputs": (),
        "repetition_detection": (),
        "thinking_token_budget": (-1,),
        "request_id": (),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "vllm_xargs": (),
        "stream_interval": (1,),
        "return_token_offsets": (False,),
        "return_mm_kwargs": (True, False),
        "routed_experts_prompt_start": (0,),
    }

    # An empty schema is one that every JSON value fits.
    asks_even_empty: ClassVar[frozenset[str]] = frozenset({"guided_json", "json_schema"})

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = 1
    stop: Any = None  # a string or a list of strings
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    max_tokens: int | None = None
    # What vLLM calls the same.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Ids | None = None
    allowed_token_ids: Ids | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # -1: to what fits
    truncation_side: Literal["left", "right"] = "left"  # the side that goes
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    cache_salt: Annotated[str, Field(max_length=MAX_CACHE_SALT)] = ""
    speculative: bool = True  # ours: false for no drafts, whatever the node does

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The field that says how long the answer may be, and what it says."""
        return "max_tokens", self.max_tokens

    def text_options(self) -> TextOptions:
        stops = [self.stop] if isinstance(self.stop, str) else given(self.stop, [])
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise InvalidRequest("stop must be a string or a list of strings, not empty", param="stop")
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise InvalidRequest(
                f"stop takes {MAX_STOPS} strings of {MAX_STOP_LENGTH} characters at most", param="stop"
            )
        return TextOptions(tuple(stops), self.include_stop_str_in_output, self.skip_special_tokens)

    def check(self, max_n: int) -> None:
        """What concerns several fields; `sampling` and `stops` check the rest."""
        if not 1 <= self.n <= max_n:
            raise InvalidRequest(f"n must be between 1 and {max_n}, got {self.n}", param="n")
        options = self.stream_options
        if (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise InvalidRequest("stream_options goes with stream only", param="stream_options")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens"
            )
        field, wanted = self.wanted_tokens
        if wanted is not None and wanted < 1:
            raise InvalidRequest(f"{field} must be at least 1, got {wanted}", param=field)

    def _sampling(
        self, max_tokens: int, logprobs: int | None, vocab_size: int, defaults: SamplingDefaults
    ) -> SamplingParams:
        top_k = 0 if self.top_k == -1 else given(self.top_k, defaults.top_k)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=given(self.temperature, defaults.temperature),
            top_k=0 if top_k >= vocab_size else top_k,
            top_p=given(self.top_p, defaults.top_p),
            min_p=given(self.min_p, defaults.min_p),
            repetition_penalty=given(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=_logit_bias(self.logit_bias),
            allowed_token_ids=_sorted_ids(self.allowed_token_ids),
            stop_token_ids=_sorted_ids(self.stop_token_ids) or (),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            seed=_seed(self.seed),
        )
        params.check_vocabulary(vocab_size)
        return params


def _seed(seed: int | None) -> int:
    """Any 64-bit integer, signed or not, as an unsigned one; without one, a random one."""
    if seed is None:
        return secrets.randbits(64)
    if not -(2**63) <= seed <= MAX_SEED:
        raise InvalidRequest("seed must be a 64-bit integer", param="seed")
    return seed & MAX_SEED


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    entries = []
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: {key!r:.40} is no token id", param="logit_bias")
        entries.append((int(key), value))
    if len(dict(entries)) < len(entries):
        raise InvalidRequest("logit_bias names a token id twice", param="logit_bias")
    return tuple(sorted(entries))


def _sorted_ids(ids: list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(sorted(set(ids)))
