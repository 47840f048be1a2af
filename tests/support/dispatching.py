"""A gateway that sends one attempt where the test says, and notes what comes of it.

For what no gateway would choose: a node that does not match, or one that has just been filled.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from common.identity import ModelIdentity
from common.sampling import SamplingParams
from common.store.client import RedisClient
from common.store.registry import NodeRecord
from common.store.requests import Requests
from common.wire.bus import Bus
from common.wire.messages import Dispatch, Failed, Stage, Tokens, TokensAck, TookOver
from tests.support.asked import a_request
from tests.support.bus_key import bus_settings


@dataclasses.dataclass(slots=True)
class Answer:
    """One choice: its tokens by position, who said that it took over, the prefix that was cached, and what
    was drafted."""

    tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    took_over: set[str] = dataclasses.field(default_factory=set)
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    failed: Failed | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.tokens[position] for position in sorted(self.tokens))


async def dispatch(
    redis: RedisClient,
    name: str,
    prompt: Sequence[int],
    params: SamplingParams,
    first: NodeRecord,
    decode: NodeRecord | None = None,
    *,
    model: ModelIdentity | None = None,
    limit_s: float = 120.0,
) -> Answer:
    """Request `name` at node `first`, which is to hand it over to `decode`; until its end. It is for
    the model of `first`, unless another is given."""
    answer = Answer()
    async with Bus(f"gateway-{name}", bus_settings()) as bus, asyncio.timeout(limit_s):
        asked = a_request(
            prompt,
            params,
            name,
            gateway=f"gateway-{name}",
            gateway_endpoint=bus.endpoint,
            model=model or ModelIdentity(first.model, first.revision, first.tokenizer),
        )
        sent = Dispatch(
            asked, 1, (0,), decode.incarnation if decode else "", decode.endpoint if decode else ""
        )
        assert await Requests(redis).accept(sent, first.incarnation)
        reason = ""
        while not reason or len(answer.tokens) < max(answer.tokens) - len(prompt) + 1:
            received = await bus.receive()
            message = received.message
            if isinstance(message, Failed):
                answer.failed = message
                return answer
            if isinstance(message, TookOver):
                answer.took_over.add(message.node)
            elif isinstance(message, Stage):
                answer.cached_tokens = max(answer.cached_tokens, message.cached_tokens)
            elif isinstance(message, Tokens):
                for run in message.runs:
                    if run.position not in answer.tokens:
                        answer.drafted += run.drafted
                        answer.accepted += run.accepted
                    answer.tokens.update(enumerate(run.token_ids, run.position))
                    reason = reason or run.finish_reason
                below = max(answer.tokens) + 1
                ack = TokensAck(f"gateway-{name}", ((name, 1, 0, below),))
                bus.send(received.peer, ack)
    return answer
