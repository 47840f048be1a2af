"""What every endpoint shares: who may ask, how much, for which model; and from body to `Work`.

Owns: the limit on bodies, and the check of a prompt against the context.
Everything here happens before anything is enqueued.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable

from starlette.requests import Request

from common.errors import ContextLengthExceeded, InvalidRequest, ServiceUnavailable
from common.sampling import SamplingParams
from gateway.access import Access
from gateway.bodies import BodyBudget, read_body
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.open_request import Work
from gateway.schemas import Body, ChatBody, CompletionBody, TokenizeBody
from gateway.served_models import ServedModel, ServedModels


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one client may ask for."""

    max_body_bytes: int = 2**22
    max_bodies_bytes: int = 2**26
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_prompts: int = 64
    retry_after_s: float = 1.0


@dataclasses.dataclass(slots=True)
class Service:
    """Built once by the app, handed to every endpoint."""

    models: ServedModels
    dispatcher: Dispatcher
    limits: ServiceLimits
    metrics: GatewayMetrics
    access: Access = dataclasses.field(default_factory=Access)
    bodies: BodyBudget = dataclasses.field(init=False)
    draining: bool = False

    def __post_init__(self) -> None:
        self.bodies = BodyBudget(self.limits.max_bodies_bytes)

    async def read(self, request: Request) -> bytes:
        """The body of a request that may be served: open service, known key, JSON, size in bounds."""
        if self.draining:
            raise ServiceUnavailable("this gateway is draining: ask another one")
        self.access.check_key(request)
        self.access.check_json(request)
        with self.bodies.share(self.access.client(request)) as share:
            return await read_body(request, self.limits.max_body_bytes, share)

    def ready(self) -> str | None:
        """None when a request for some model could be placed now, else what each of them lacks."""
        lacking = [self.dispatcher.ready(model.identity) for model in self.models]
        return "; ".join(filter(None, lacking)) if all(lacking) else None

    def room(self, model: ServedModel, prompt_ids: list[int], param: str) -> int:
        """Positions the context leaves after the prompt: at least one, else it is refused."""
        context = model.max_model_len
        limits = (self.limits.max_prompt_tokens, context and context - 1)
        longest = min((limit for limit in limits if limit is not None), default=None)
        if longest is not None and len(prompt_ids) > longest:
            raise ContextLengthExceeded(
                f"{param} has {len(prompt_ids)} tokens, {longest} are allowed"
                + (f": the context is {context}" if context else ""),
                param=param,
            )
        if not prompt_ids:
            raise InvalidRequest(f"{param} must not be empty", param=param)
        return context - len(prompt_ids) if context else 2**20

    def work(
        self,
        request_id: str,
        model: ServedModel,
        prompt_ids: list[int],
        param: str,
        body: Body,
        sampling: Callable[[int, int], SamplingParams],
        request: Request,
    ) -> Work:
        room = self.room(model, prompt_ids, param)
        held = self.dispatcher.longest_request(model.identity)
        # A client that does not say how much it wants gets what the nodes can hold.
        default = room if held is None else min(room, held - len(prompt_ids))
        params = sampling(default, model.vocab_size)
        if params.max_tokens > room:
            raise ContextLengthExceeded(
                f"max_tokens is {params.max_tokens}, but the context of {model.max_model_len} "
                f"tokens leaves {room} after the prompt's {len(prompt_ids)}",
                param="max_tokens",
            )
        return Work(
            request=request_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            model=model.identity,
            n=body.n,
            cache_salt=body.cache_salt or "",
            priority=body.priority,
            trace=request.headers.get("traceparent", "")[:128],
        )

    async def completion_prompts(self, model: ServedModel, body: CompletionBody) -> list[list[int]]:
        """Token ids of each prompt."""
        most = min(self.limits.max_prompts, self.dispatcher.max_open)
        prompts = body.prompts(most, model.vocab_size)
        return [
            prompt
            if isinstance(prompt, list)
            else await model.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)
            for prompt in prompts
        ]

    async def chat_prompt(self, model: ServedModel, body: ChatBody | TokenizeBody) -> list[int]:
        """Token ids of the messages. The template writes special tokens, so none are added."""
        assert body.messages is not None
        prompt = model.tokenizer.render_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        return await model.tokenizer.encode(prompt, add_special_tokens=False)

    @staticmethod
    def new_id(prefix: str) -> str:
        return f"{prefix}-{secrets.token_hex(12)}"
