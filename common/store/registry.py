"""Who is there: nodes and gateways in Redis, each written by its own incarnation.

Owns: identities, beats and their ages. Concludes nothing from them: what is old or missing means that
Redis has not heard of the incarnation, for which Redis itself may be the reason. Death is what a peer
sees on its link (bus.py): loss, or beats without progress.

Every node reads every other at every beat, so a beat is ten numbers, written and read in one round trip
each. Who a node is, as well as its KV links, is written when it changes; every beat names the identity
that it belongs to by a digest, and a reader that knows another one reads it anew. KV links, as many as
there are nodes, are read by nobody but people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence

from common.errors import ConfigError, ServiceUnavailable
from common.logs import get_logger
from common.store import registry_scripts as scripts
from common.store.client import RedisClient, text
from common.store.keys import NODE_TTL_S
from common.store.node_record import (
    IDENTITY,
    NodeRecord,
    NodeState,
    Role,
    beat_of,
    digest_of,
    identity_from,
    identity_of,
    joined,
)

__all__ = ["KVLink", "NodeRecord", "NodeState", "Registry", "Role", "Snapshot", "new_incarnation"]

log = get_logger("registry")

SILENT_S, LOST_S = 5.0, 30.0  # without a beat, which comes once a second or more often

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST, _KV_LINKS = "identity", "kv_links"  # fields beside those of an identity

KVLink = dict[str, str]  # of `Links.describe`: link, peer, transport, reason, direction


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """All records at one moment. `ages` are seconds since each one's last beat, on Redis' clock;
    `generation` changes when Redis lost content (RedisClient.generation)."""

    records: dict[str, NodeRecord]
    ages: dict[str, float]
    generation: str

    def standing(self, incarnation: str) -> str:
        """What a person is to think of it: the state that it says, while it says something."""
        age = self.ages[incarnation]
        if age > LOST_S:
            return "lost"
        return "silent" if age > SILENT_S else self.records[incarnation].state.value

    def of_role(self, *roles: Role) -> list[NodeRecord]:
        return [record for record in self.records.values() if record.role in roles]


def new_incarnation(name: str) -> str:
    """Name of one life of a node: its name and something random. `ConfigError` for a name that
    would not do as part of a key."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"a name has up to 64 letters, digits, dots and dashes, unlike {name!r}", param="name"
        )
    return f"{name}-{secrets.token_hex(4)}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Announced:
    """What Redis has of an incarnation that this process writes, beside its beats."""

    identity: tuple[object, ...]
    digest: str
    kv_links: list[KVLink]


class Registry:
    """Reads all records, writes those it is given. Any number may exist; each remembers what it
    wrote and read last, to say and ask less the next time."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._keys = client.keys
        self._announced: dict[str, _Announced] = {}
        self._known: dict[str, tuple[str, NodeRecord]] = {}  # digest, and the record without a beat

    async def announce(self, record: NodeRecord, kv_links: Iterable[KVLink] = ()) -> None:
        """Write a beat, whatever changed of the identity and the KV links, and renew their times to
        live: registration, every beat, and the return after Redis lost its content are the same."""
        name, links = record.incarnation, list(kv_links)
        identity = identity_of(record)
        before = self._announced.pop(name, None)  # unknown until Redis has answered
        if before is not None and before.identity == identity:
            now = _Announced(identity, before.digest, links)
        else:
            now = _Announced(identity, digest_of(identity), links)
        if before is None or not await self._write(record, now, before):
            await self._write(record, now, None)
        self._announced[name] = now

    async def _write(self, record: NodeRecord, now: _Announced, before: _Announced | None) -> bool:
        """False, and nothing written, if Redis has not even what it had `before`."""
        fields: dict[str, str] = {}
        if before is None or before.digest != now.digest:
            fields.update(zip(IDENTITY, map(str, now.identity), strict=True))
            fields[_DIGEST] = now.digest
        if before is None or before.kv_links != now.kv_links:
            fields[_KV_LINKS] = json.dumps(now.kv_links)
        name = record.incarnation
        return await self._client.call(
            scripts.AnnounceNode(
                node=self._keys.node(name),
                beat=self._keys.beat(name),
                nodes=self._keys.nodes(),
                incarnation=name,
                whole=before is None,
                fields=fields,
                identity=now.digest,
                numbers=[str(value) for value in beat_of(record)],
            )
        )

    async def say_alone(self, incarnation: str, alone: str) -> None:
        """Write `Beat.alone`, and nothing else, before the next beat does."""
        key = self._keys.beat(incarnation)
        await self._client.pipeline(("HSET", key, "alone", alone), ("EXPIRE", key, NODE_TTL_S))

    async def alone(self, incarnation: str) -> str | None:
        """`Beat.alone` of one incarnation as it is now; None if it has no beat."""
        found = await self._client.command("HGET", self._keys.beat(incarnation), "alone")
        return None if found is None else text(found)

    async def leave(self, incarnation: str) -> int:
        """Remove what an incarnation that has ended leaves: identity, beat, index entry, queue and load.
        Entries that nobody has claimed are given back to their gateways; the number of them."""
        self._announced.pop(incarnation, None)
        keys = self._keys
        return await self._client.call(
            scripts.RemoveNode(
                node=keys.node(incarnation),
                beat=keys.beat(incarnation),
                nodes=keys.nodes(),
                stream=keys.stream(incarnation),
                load=keys.load(incarnation),
                incarnation=incarnation,
                record_stem=keys.request(""),
                load_stem=keys.load(""),
            )
        )

    async def snapshot(self) -> Snapshot:
        """All records and their ages. One of a newer version that cannot be read is left out, and
        logged. An identity without a beat counts as `starting`. Two round trips, and one more where
        there is an identity that this reader does not know."""
        generation = await self._client.generation()
        beats = await self._client.call(
            scripts.ReadBeats(nodes=self._keys.nodes(), beat_stem=self._keys.beat(""))
        )
        found: list[tuple[str, int, list[str | bool]]] = json.loads(beats) or []  # Lua's is {}
        await self._know({name: digest for name, _, (digest, *_) in found})
        records: dict[str, NodeRecord] = {}
        for name, _, (digest, *values) in found:
            if name not in self._known:
                continue
            identity = self._known[name][1]
            if not digest:
                records[name] = dataclasses.replace(identity, state=NodeState.STARTING)
            elif (record := joined(identity, values)) is not None:
                records[name] = record
        ages = {name: max(0, age_ms) / 1000 for name, age_ms, _ in found}
        return Snapshot(records, ages, generation)

    async def _know(self, digests: dict[str, str | bool]) -> None:
        """Read the identities that beats name and we do not know, and forget those that are gone."""
        known = self._known
        self._known = {name: known[name] for name in digests if name in known}
        new = [name for name in digests if name not in known or digests[name] not in (False, known[name][0])]
        for name, fields in (await self._fields(new, (_DIGEST, *IDENTITY))).items():
            self._known.pop(name, None)
            if (identity := identity_from(fields)) is not None:
                self._known[name] = fields.get(_DIGEST, ""), identity

    async def _fields(self, incarnations: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Of each identity those fields that it has; none of one that is not there."""
        if not incarnations:
            return {}
        replies = await self._client.read(
            *(("HMGET", self._keys.node(incarnation), *names) for incarnation in incarnations)
        )
        return {
            incarnation: {
                name: text(value) for name, value in zip(names, reply, strict=True) if value is not None
            }
            for incarnation, reply in zip(incarnations, replies, strict=True)
        }

    async def kv_links(self, incarnations: Sequence[str]) -> dict[str, list[KVLink]]:
        """The links over which KV comes and goes at each, with transport and why it is that one."""
        stored = await self._fields(incarnations, (_KV_LINKS,))
        return {name: _links(fields.get(_KV_LINKS, "")) for name, fields in stored.items()}

    async def watch(self, interval_s: float) -> AsyncIterator[Snapshot]:
        """A snapshot now, then one per interval, without end. While Redis cannot be reached there
        is none: the caller goes on with the last one, and with what its links tell."""
        reachable = True
        while True:
            try:
                snapshot = await self.snapshot()
            except ServiceUnavailable as error:
                if reachable:
                    log.warning("registry.unreachable", error=error)
                reachable = False
            else:
                if not reachable:
                    log.info("registry.reachable")
                reachable = True
                yield snapshot
            await asyncio.sleep(interval_s)


def _links(stored: str) -> list[KVLink]:
    try:
        found: list[KVLink] = json.loads(stored or "[]")
    except ValueError:
        return []
    return found
