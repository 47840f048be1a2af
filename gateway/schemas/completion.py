"""The body of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from common.errors import InvalidRequest
from common.model_folder.generation import SamplingDefaults
from common.sampling import SamplingParams
from gateway.schemas.fields import given
from gateway.schemas.generation import Body
from gateway.schemas.prompts import Prompts, parse_prompts


class CompletionBody(Body):
    not_built: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Body.not_built,
        "suffix": (),
        "prompt_embeds": (),
    }

    prompt: Any  # string, list of strings, token ids, list of token id lists: see `prompts`
    echo: bool = False
    best_of: int | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True

    def check(self, max_n: int) -> None:
        super().check(max_n)
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of is not supported beyond n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs is not supported yet: the prompt's logprobs are not computed",
                param="echo",
            )

    def prompts(self, max_prompts: int, vocab_size: int) -> Prompts:
        return parse_prompts(self.prompt, max_prompts, vocab_size)

    def sampling(self, room: int, vocab_size: int, defaults: SamplingDefaults) -> SamplingParams:
        """`room`: positions the context leaves after the prompt; OpenAI's default is 16, and as in
        vLLM the model's own can only lower it."""
        wanted = given(self.max_tokens, max(1, min(16, room, defaults.max_tokens or 16)))
        return self._sampling(wanted, self.logprobs, vocab_size, defaults)
