"""What all endpoints share: admission of a request, limits, the model, and the way from a body to `Work`.

Owns: the limit on bodies, and the check of a prompt against the context. Everything here happens before
anything is enqueued.
"""

from __future__ import annotations

import dataclasses
import secrets

from starlette.requests import Request as HttpRequest

from common.errors import ContextLengthExceeded, InvalidRequest, ServiceUnavailable, TokenOutOfRange
from common.request import Request
from gateway.access import Access
from gateway.bodies import BodyBudget, read_body
from gateway.dispatch import Dispatcher
from gateway.intake.pool import Intake
from gateway.intake.prepare import Prepared, Question, TokenIds
from gateway.metrics import GatewayMetrics
from gateway.open_request import Work
from gateway.schemas import Body, ChatBody, CompletionBody
from gateway.served_models import ServedModel, ServedModels
from gateway.unknown_fields import Policy, UnknownFields


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
    intake: Intake
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

    async def prepared(self, kind: str, request: HttpRequest) -> Prepared:
        """Check that the request may be served (service open, key known, JSON, size in bounds), and prepare
        its body (`intake.prepare`). `request.state` notes which fields are ignored."""
        if self.draining:
            raise ServiceUnavailable("this gateway is draining: ask another one")
        self.access.check_key(request)
        self.access.check_json(request)
        client = self.access.client(request)
        question = Question(
            kind,
            max_n=self.limits.max_n,
            max_prompts=min(self.limits.max_prompts, self.dispatcher.max_open),
            max_prompt_tokens=self.limits.max_prompt_tokens,
            refuse_unknown=self.unknown_fields.are_refused,
            contexts={model.name: self.context_length(model) for model in self.models},
        )
        with self.bodies.share(client) as share:
            body = await read_body(request, self.limits.max_body_bytes, share)
            prepared = await self.intake.prepare(client, question, body)
        ignored = self.unknown_fields.ignored(prepared.unknown, request.url.path)
        request.state.ignored_fields = ignored
        return prepared

    def ready(self) -> str | None:
        """None when a request for some model could be placed now, else what each of them lacks."""
        lacking = [self.dispatcher.ready(model.identity) for model in self.models]
        return "; ".join(filter(None, lacking)) if all(lacking) else None

    def work(
        self,
        request_id: str,
        model: ServedModel,
        prompt_ids: TokenIds,
        param: str,
        body: ChatBody | CompletionBody,
        request: HttpRequest,
        prediction: TokenIds = (),
    ) -> Work:
        """`param` names the field that the prompt came from."""
        if not prompt_ids:
            raise InvalidRequest(f"{param} must not be empty", param=param)
        if (highest := max(prompt_ids)) >= model.vocab_size:
            # Token ids of clients are checked before; text may hold a token that the tokenizer has
            # and the model has not.
            raise TokenOutOfRange(
                f"{param} has token id {highest}, outside the vocabulary of {model.vocab_size}", param=param
            )
        prompt_ids = self._truncated(model, prompt_ids, body)
        room = self._room(model, prompt_ids, param)
        context = self.context_length(model)
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
        asked = Request(
            id=request_id,
            model=model.identity,
            token_ids=tuple(prompt_ids),
            prompt_len=len(prompt_ids),
            params=params,
            cache_salt=body.cache_salt,
            priority=body.priority,
            speculative=body.speculative,
            prediction=tuple(prediction),
        )
        return Work(asked, n=body.n)

    def context_length(self, model: ServedModel) -> int | None:
        """Positions of the model's context, or of its nodes' where all have a shorter one; None
        where nobody says."""
        known = (model.max_model_len, self.dispatcher.longest_context(model.identity))
        return min((length for length in known if length is not None), default=None)

    def _truncated(self, model: ServedModel, prompt_ids: TokenIds, body: Body) -> TokenIds:
        """What `truncate_prompt_tokens` leaves: -1 leaves room for the tokens that are wanted."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return prompt_ids
        if keep == -1:
            wanted = body.wanted_tokens[1] or 1
            context = self.context_length(model)
            limits = (self.limits.max_prompt_tokens, context and context - wanted)
            known = [limit for limit in limits if limit is not None]
            if not known:
                return prompt_ids
            keep = max(1, min(known))
        return prompt_ids[-keep:] if body.truncation_side == "left" else prompt_ids[:keep]

    def _room(self, model: ServedModel, prompt_ids: TokenIds, param: str) -> int:
        """Positions the context leaves after the prompt: at least one, else it is refused."""
        model.check_length(len(prompt_ids), self.limits.max_prompt_tokens, param)
        return model.max_model_len - len(prompt_ids) if model.max_model_len else 2**20

    @staticmethod
    def new_id(prefix: str) -> str:
        return f"{prefix}-{secrets.token_hex(12)}"
