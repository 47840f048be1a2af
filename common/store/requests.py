"""Requests as Redis knows them: accepted once, claimed once, merged forward, closed once.

Owns: the record of a request and every write to it. Knows nothing of HTTP, of sockets, or of what
computes. The fields are listed in records.py, the states in request_state.py.

    gateway   accept ──▶ record, queue entry and load, in one atomic write; only now it is accepted
    node      claim  ──▶ exactly one incarnation wins an attempt, and with it state `prefilling`
    gateway   advance ─▶ handing_off, decoding: what the nodes told it (messages Stage, TookOver)
    gateway   finish, cancel ─▶ closed: loads taken back, time to live set for inspection

That is a handful of writes per request and none per token. Every one is idempotent. All raise
`ServiceUnavailable` when Redis cannot be reached in time; then nobody knows whether the write
happened, and the caller repeats it or gives up, both without harm.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence

from common.errors import InvalidRequest, MalformedMessage
from common.logs import get_logger
from common.store import request_scripts as scripts
from common.store.client import RedisClient, text
from common.store.keys import DEAD_LETTERS, WORK_TTL_S
from common.store.request_record import RequestRecord, record_of
from common.store.request_state import Claim, Place, State
from common.wire.codec import decode, encode
from common.wire.messages import Dispatch

__all__ = ["Claim", "DeadLetter", "Load", "Place", "Requests", "State", "Where"]

log = get_logger("requests")

LOCATED_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """`node` has it: queued or claimed; else it is ""."""

    place: Place
    node: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Work given to an incarnation and not finished, by all gateways together."""

    requests: int = 0
    prompt_tokens: int = 0  # of attempts whose prompt is not computed yet


@dataclasses.dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that made engines fail, also when it was alone; `at` is unix ms."""

    id: str
    at: int
    request: str
    attempt: int
    reason: str
    dispatch: Dispatch | None


class Requests:
    """Reads and writes records. Holds no state of its own; any number may exist."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._keys = client.keys

    async def accept(self, dispatch: Dispatch, node: str, *, claimed_by: str = "") -> bool:
        """Write the record of this attempt and put it into the stream of `node`.

        False if this attempt was accepted before, or a newer one of any of its choices was.
        With `claimed_by` nothing is queued: that is how a gateway asserts an attempt that a node
        works on already, after Redis lost its content; `advance` then restores its state.
        """
        keys, request = self._keys, dispatch.request
        return await self._client.call(
            scripts.AcceptAttempt(
                record=keys.request(request.id),
                stream=keys.stream(node),
                recent=keys.requests(),
                load_stem=keys.load(""),
                open_stem=keys.open_requests(""),
                request=request.id,
                attempt=dispatch.attempt,
                choices=dispatch.choices,
                node=node,
                tokens=len(request.token_ids),
                dispatch=b"" if claimed_by else encode(dispatch),
                claimed_by=claimed_by,
                fields={
                    "gateway": request.gateway,
                    "model": request.model.name,
                    "prompt_len": request.prompt_len,
                    "priority": request.priority,
                    "pinned": dispatch.node,
                },
            )
        )

    async def claim(self, request: str, attempt: int, incarnation: str) -> Claim:
        """Try to become the one that computes this attempt. Only WON, or HELD by a caller that
        does not compute it yet, gives the right to."""
        return await self._client.call(
            scripts.ClaimAttempt(
                record=self._keys.request(request),
                load_stem=self._keys.load(""),
                open_stem=self._keys.open_requests(""),
                request=request,
                attempt=attempt,
                incarnation=incarnation,
            )
        )

    async def locate(self, choices: Sequence[tuple[str, int, int]]) -> list[Where]:
        """For each (request, attempt, choice): who has it. A round trip for LOCATED_AT_ONCE of them.
        What a gateway asks about those of which no node has said anything."""
        found: list[Where] = []
        for start in range(0, len(choices), LOCATED_AT_ONCE):
            page = choices[start : start + LOCATED_AT_ONCE]
            places = await self._client.call(
                scripts.LocateChoices(
                    records=[self._keys.request(request) for request, _, _ in page],
                    attempts=[attempt for _, attempt, _ in page],
                    choices=[choice for _, _, choice in page],
                )
            )
            found += [Where(place, node) for place, node in places]
        return found

    async def advance(
        self,
        request: str,
        attempt: int,
        choices: Sequence[int],
        state: State,
        *,
        node: str = "",
        seconds: Mapping[str, float] | None = None,
        generated: int = 0,
        cached_tokens: int = 0,
    ) -> bool:
        """Merge what is known of these choices; True if it raised the state of any.

        `node` is who prefills or decodes, with these states; from `decoding` on it counts in that
        node's load. `seconds` are durations by stage name; they and the counts only ever grow, and
        are merged even where the state itself comes late.
        """
        raised = await self._merge(
            request,
            attempt,
            choices,
            state,
            node=node,
            seconds=seconds,
            generated=generated,
            cached_tokens=cached_tokens,
        )
        return raised > 0

    async def finish(
        self,
        request: str,
        attempt: int,
        choices: Sequence[int],
        state: State = State.FINISHED,
        *,
        finish_reason: str = "",
        error: str = "",
        message: str = "",
        seconds: Mapping[str, float] | None = None,
        generated: int = 0,
        cached_tokens: int = 0,
    ) -> bool:
        """End these choices; False if they had ended, or a newer attempt has them.

        With the last choice the request is closed: it leaves its gateway's open requests, and its
        record stays for INSPECT_TTL_S. `error` is a code of errors.py.
        """
        assert state.terminal, state
        raised = await self._merge(
            request,
            attempt,
            choices,
            state,
            seconds=seconds,
            generated=generated,
            cached_tokens=cached_tokens,
            ending={"finish_reason": finish_reason, "error": error, "message": message},
        )
        return raised > 0

    async def cancel(self, request: str, reason: str) -> bool:
        """End every choice that has not ended, whatever attempt it is in."""
        return await self._end_all(request, State.CANCELLED, "request_aborted", reason)

    async def fail(self, request: str, error: str, message: str) -> bool:
        """End every choice that has not ended as failed; how the reaper closes what a dead gateway
        left."""
        return await self._end_all(request, State.FAILED, error, message)

    async def dead_letter(self, dispatch: Dispatch, reason: str) -> None:
        """Keep a request that brought a node down while alone, for a person to look at."""
        await self._client.call(
            scripts.AddDeadLetter(
                dead_letters=self._keys.dead_letters(),
                fields={
                    "request": dispatch.request.id,
                    "attempt": dispatch.attempt,
                    "reason": reason,
                    "dispatch": encode(dispatch),
                },
            )
        )

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The latest, newest first. One that another version wrote has no dispatch."""
        entries = await self._client.command("XREVRANGE", self._keys.dead_letters(), "+", "-", "COUNT", limit)
        return [_dead_letter(text(entry_id), fields) for entry_id, fields in entries]

    async def requeue(self, name: str, node: str = "") -> str:
        """Have a gateway compute the prompt of a dead letter once more; `name` is the letter's id or
        the request's, `node` the incarnation that shall do it (any). The new request's id.
        `InvalidRequest` if there is no such letter."""
        for letter in await self.dead_letters(DEAD_LETTERS):
            if name in (letter.id, letter.request) and letter.dispatch is not None:
                replay = f"{letter.request}-again-{secrets.token_hex(3)}"
                dispatch = dataclasses.replace(
                    letter.dispatch,
                    attempt=1,
                    node=node,
                    request=dataclasses.replace(letter.dispatch.request, id=replay),
                )
                key = self._keys.requeued()
                await self._client.pipeline(("RPUSH", key, encode(dispatch)), ("EXPIRE", key, WORK_TTL_S))
                return replay
        raise InvalidRequest(f"no dead letter {name!r:.200} that can be read", param="id")

    async def take_requeued(self) -> Dispatch | None:
        """The next one that `requeue` left, which is the caller's to run; None if there is none."""
        found = await self._client.command("LPOP", self._keys.requeued())
        if found is None:
            return None
        try:
            message = decode(found)
        except MalformedMessage as error:
            log.warning("requests.unreadable_replay", error=error)
            return None
        return message if isinstance(message, Dispatch) else None

    async def get(self, request: str) -> RequestRecord | None:
        (record,) = await self.get_all([request])
        return record

    async def get_all(self, requests: Sequence[str]) -> list[RequestRecord | None]:
        """Records in the order asked; None for one that is gone, or that cannot be read."""
        if not requests:
            return []
        replies = await self._client.read(*(("HGETALL", self._keys.request(request)) for request in requests))
        return [
            record_of(request, reply) if reply else None
            for request, reply in zip(requests, replies, strict=True)
        ]

    async def recent(self, limit: int = 100) -> list[RequestRecord]:
        """The latest requests, newest first, open or closed."""
        ids = await self._client.command("ZREVRANGE", self._keys.requests(), 0, limit - 1)
        records = await self.get_all([text(request) for request in ids])
        return [record for record in records if record is not None]

    async def open_requests(self, gateway: str) -> set[str]:
        """What a gateway incarnation has accepted and not answered."""
        members = await self._client.command("SMEMBERS", self._keys.open_requests(gateway))
        return {text(member) for member in members}

    async def loads(self, incarnations: Sequence[str]) -> dict[str, Load]:
        """Load of each incarnation; all of them in one round trip."""
        if not incarnations:
            return {}
        replies = await self._client.read(
            *(("HGETALL", self._keys.load(incarnation)) for incarnation in incarnations)
        )
        return {incarnation: load_of(reply) for incarnation, reply in zip(incarnations, replies, strict=True)}

    async def _end_all(self, request: str, state: State, error: str, message: str) -> bool:
        ending = {"error": error, "message": message}
        return await self._merge(request, None, (), state, ending=ending) > 0

    async def _merge(
        self,
        request: str,
        attempt: int | None,
        choices: Sequence[int],
        state: State,
        *,
        node: str = "",
        seconds: Mapping[str, float] | None = None,
        generated: int = 0,
        cached_tokens: int = 0,
        ending: Mapping[str, str] | None = None,
    ) -> int:
        maxima: dict[str, str | int] = {
            f"seconds.{stage}": f"{value:.6f}" for stage, value in (seconds or {}).items()
        }
        if generated:
            maxima["generated"] = generated
        if cached_tokens:
            maxima["cached_tokens"] = cached_tokens
        return await self._client.call(
            scripts.MergeChoices(
                record=self._keys.request(request),
                load_stem=self._keys.load(""),
                open_stem=self._keys.open_requests(""),
                request=request,
                attempt=attempt,
                choices=choices,
                state=state,
                node=node,
                maxima=maxima,
                ending={name: value for name, value in (ending or {}).items() if value},
            )
        )


def _dead_letter(entry_id: str, reply: Mapping[bytes, bytes]) -> DeadLetter:
    fields = {text(name): value for name, value in reply.items()}
    dispatch = None
    try:
        message = decode(fields.get("dispatch", b""))
        dispatch = message if isinstance(message, Dispatch) else None
    except MalformedMessage as error:
        log.warning("requests.unreadable_letter", id=entry_id, error=error)
    return DeadLetter(
        entry_id,
        int(entry_id.partition("-")[0]),
        text(fields.get("request", b"")),
        int(fields.get("attempt", 0)),
        text(fields.get("reason", b"")),
        dispatch,
    )


def load_of(reply: Mapping[bytes, bytes]) -> Load:
    """The load in a reply to HGETALL; what cannot be read counts as none, and is logged."""
    try:
        return Load(int(reply.get(b"requests", 0)), max(0, int(reply.get(b"prompt_tokens", 0))))
    except ValueError as error:
        log.warning("requests.unreadable_load", error=error)
        return Load()
