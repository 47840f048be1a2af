"""What every endpoint shares: who may ask, how much, for which model; and from body to `Work`.

Owns: the limit on bodies, and the check of a prompt against the context.
Everything here happens before anything is enqueued.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import TypeVar

from starlette.requests import Request

from common.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ServiceUnavailable,
    TokenOutOfRange,
)
from gateway.access import Access
from gateway.bodies import BodyBudget, read_body
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.open_request import Work
from gateway.schemas import Body, ChatBody, CompletionBody, TokenizeBody, parse
from gateway.schemas.fields import Fields
from gateway.served_models import ServedModel, ServedModels
from gateway.unknown_fields import Policy, UnknownFields

AnyBody = TypeVar("AnyBody", bound=Fields)


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one client may ask for."""

    max_body_bytes: int = 2**22
    max_bodies_bytes: int = 2**26
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_prompts: int = 64
    unknown_fields: Policy = "warn"
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
    unknown_fields: UnknownFields = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.bodies = BodyBudget(self.limits.max_bodies_bytes)
        self.unknown_fields = UnknownFields(self.limits.unknown_fields, self.metrics)

    async def body(self, kind: type[AnyBody], request: Request) -> AnyBody:
        """The parsed body; `request.state` remembers which of its fields are ignored."""
        body = parse(kind, await self._read(request))
        request.state.ignored_fields = self.unknown_fields.ignored(body, request.url.path)
        return body

    async def _read(self, request: Request) -> bytes:
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

    def work(
        self,
        request_id: str,
        model: ServedModel,
        prompt_ids: list[int],
        param: str,
        body: ChatBody | CompletionBody,
        request: Request,
    ) -> Work:
        """`param` names the field that the prompt came from."""
        if not prompt_ids:
            raise InvalidRequest(f"{param} must not be empty", param=param)
        if (highest := max(prompt_ids)) >= model.vocab_size:
            # Token ids of clients are checked before; text may hold a token that the tokenizer has
            # and the model has not.
            raise TokenOutOfRange(
                f"{param} has token id {highest}, outside the vocabulary of {model.vocab_size}",
                param=param,
            )
        prompt_ids = self._truncated(model, prompt_ids, body)
        room = self._room(model, prompt_ids, param)
        context = self._context(model)
        if context is not None and (room := context - len(prompt_ids)) < 1:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, your {param} "
                f"has {len(prompt_ids)} tokens. Please reduce the length of the {param}.",
                param=param,
            )
        held = self.dispatcher.longest_request(model.identity)
        # A client that does not say how much it wants gets what the nodes can hold.
        default = room if held is None else min(room, held - len(prompt_ids))
        params = body.sampling(default, model.vocab_size, model.sampling_defaults)
        if params.max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, you "
                f"requested {len(prompt_ids) + params.max_tokens} tokens ({len(prompt_ids)} in the "
                f"{param}, {params.max_tokens} in {body.wanted_tokens[0]}). Please reduce one of "
                "them.",
                param=body.wanted_tokens[0],
            )
        return Work(
            request=request_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            model=model.identity,
            n=body.n,
            cache_salt=body.cache_salt,
            priority=body.priority,
            trace=request.headers.get("traceparent", "")[:128],
        )

    def _context(self, model: ServedModel) -> int | None:
        """Positions of the model's context, or of its nodes' where all have a shorter one."""
        known = (model.max_model_len, self.dispatcher.longest_context(model.identity))
        return min((length for length in known if length is not None), default=None)

    def _longest_prompt(self, model: ServedModel) -> int | None:
        context = model.max_model_len
        limits = (self.limits.max_prompt_tokens, context and context - 1)
        return min((limit for limit in limits if limit is not None), default=None)

    def _truncated(self, model: ServedModel, prompt_ids: list[int], body: Body) -> list[int]:
        """What `truncate_prompt_tokens` leaves: -1 leaves room for the tokens that are wanted."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return prompt_ids
        if keep == -1:
            longest = self._longest_prompt(model)
            if longest is None:
                return prompt_ids
            wanted = body.wanted_tokens[1] or 1
            context = model.max_model_len or longest + wanted
            keep = max(1, min(longest, context - wanted))
        return prompt_ids[-keep:] if body.truncation_side == "left" else prompt_ids[:keep]

    def _room(self, model: ServedModel, prompt_ids: list[int], param: str) -> int:
        """Positions the context leaves after the prompt: at least one, else it is refused."""
        longest = self._longest_prompt(model)
        if longest is not None and len(prompt_ids) > longest:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {model.max_model_len or longest} tokens. "
                f"However, your {param} has {len(prompt_ids)} tokens, and {longest} are allowed. "
                f"Please reduce the length of the {param}.",
                param=param,
            )
        return model.max_model_len - len(prompt_ids) if model.max_model_len else 2**20

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
        """Token ids of the messages. Most templates write special tokens themselves."""
        assert body.messages is not None
        prompt = model.tokenizer.render_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.opens_an_answer,
            continue_final_message=body.continue_final_message,
            variables=body.template_variables,
        )
        add = body.add_special_tokens is True
        return await model.tokenizer.encode(prompt, add_special_tokens=add)

    @staticmethod
    def new_id(prefix: str) -> str:
        return f"{prefix}-{secrets.token_hex(12)}"
