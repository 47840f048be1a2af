"""Who is there: records of nodes and gateways in Redis, each written by its own incarnation.

Owns: the record and its age. Concludes nothing from them: a record that is old or missing means
that Redis has not heard of the incarnation, for which Redis itself may be the reason. Death is what
a peer sees on its link (bus.py): loss, or beats without progress.

Every node reads every record at every beat, so a beat is small at both ends: a writer sends the
fields that changed, a reader asks for the numbers of the moment and knows the rest already, by the
digest that stands beside them (`identity`). A node's KV links, as many as there are nodes, are read
by nobody but people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import hashlib
import json
import re
import secrets
import typing
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from common import registry_scripts as scripts
from common.errors import ConfigError, ServiceUnavailable
from common.kv_layout import Fingerprint
from common.logs import get_logger
from common.redis_client import RedisClient, scores, text
from common.redis_keys import NODE_TTL_S

log = get_logger("registry")

SILENT_S, LOST_S = 5.0, 30.0  # without a beat, which comes once a second or more often

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"
    GATEWAY = "gateway"


class NodeState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # takes nothing new


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRecord:
    """What an incarnation says of itself. A new field is one line here, with a default; a reader of
    an older version ignores it. Types: text, int, float, or one of the enums above."""

    incarnation: str
    name: str
    role: Role
    state: NodeState = NodeState.STARTING
    endpoint: str = ""  # where its bus listens
    url: str = ""  # where its HTTP listens, if any
    host: str = ""
    pid: int = 0
    cores: int = 0
    started_at: int = 0  # unix ms
    version: str = ""
    model: str = ""
    revision: str = ""
    layout: str = ""
    numerics: str = ""
    adapter: str = ""
    tokenizer: str = ""
    transports: str = ""  # with commas, preferred first
    block_size: int = 0
    slab_bytes: int = 0
    num_blocks: int = 0
    max_num_seqs: int = 0
    max_model_len: int = 0
    # from here on, and `state`: what changes during a life
    waiting: int = 0
    running: int = 0
    free_blocks: int = 0
    open_attempts: int = 0  # requests of which this node still has something
    leases: int = 0  # of blocks that a peer may still read
    reserved: int = 0  # prompts with room here that are on their way
    unacknowledged: int = 0  # choices whose gateway has not acknowledged all tokens
    steps: int = 0
    beats: int = 0
    alone: str = ""  # request/attempt@position: whose own step computes just now, up to where

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            self.model, self.revision, self.layout, self.numerics, self.block_size, self.adapter,
            self.tokenizer,
        )  # fmt: skip


_TYPES: dict[str, Any] = typing.get_type_hints(NodeRecord)  # costs 0.3 ms
_NAMES = tuple(field.name for field in dataclasses.fields(NodeRecord))
_OF_THE_MOMENT = ("state", *_NAMES[_NAMES.index("waiting") :])
_OF_A_LIFE = tuple(name for name in _NAMES if name not in _OF_THE_MOMENT)
_UNKNOWN = "\0"  # no field is this
_IDENTITY, _KV_LINKS = "identity", "kv_links"  # fields of the hash that are none of the record

KVLink = dict[str, str]  # of `Links.describe`: link, peer, transport, reason, direction, blocks


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


class Registry:
    """Reads all records, writes those it is given. Any number may exist; each remembers what it
    wrote and read last, to say and ask less the next time."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._keys = client.keys
        self._written: dict[str, dict[str, str]] = {}  # incarnation → fields, as Redis has them
        self._known: dict[str, tuple[str, NodeRecord]] = {}  # with the digest of its identity

    async def announce(self, record: NodeRecord, kv_links: Iterable[KVLink] = ()) -> None:
        """Write the record and renew its time to live: registration, every beat, and the return
        after Redis lost its content are the same thing."""
        name = record.incarnation
        fields = {name: str(getattr(record, name)) for name in _NAMES}
        fields[_IDENTITY] = _digest(fields[name] for name in _OF_A_LIFE)
        fields[_KV_LINKS] = json.dumps(list(kv_links))
        written = self._written.pop(name, None)  # unknown until Redis has answered
        if written is not None:
            changed = {field: value for field, value in fields.items() if written[field] != value}
            if await self._write(name, changed, whole=False):
                self._written[name] = fields
                return
        await self._write(name, fields, whole=True)
        self._written[name] = fields

    async def _write(self, incarnation: str, fields: Mapping[str, str], *, whole: bool) -> bool:
        """False, and nothing written, for a part of a record that is not there any more."""
        return await self._client.call(
            scripts.AnnounceNode(
                record=self._keys.node(incarnation),
                nodes=self._keys.nodes(),
                incarnation=incarnation,
                ttl_s=NODE_TTL_S,
                whole=whole,
                fields=fields,
            )
        )

    async def say_alone(self, incarnation: str, alone: str) -> None:
        """Write `NodeRecord.alone`, and nothing else, before the next beat does: which writes it, too,
        if this fails."""
        key, written = self._keys.node(incarnation), self._written.get(incarnation, {})
        written["alone"] = _UNKNOWN
        await self._client.pipeline(("HSET", key, "alone", alone), ("EXPIRE", key, NODE_TTL_S))
        written["alone"] = alone

    async def alone(self, incarnation: str) -> str | None:
        """`NodeRecord.alone` of one incarnation as it is now; None if there is no record."""
        found = await self._client.command("HGET", self._keys.node(incarnation), "alone")
        return None if found is None else text(found)

    async def leave(self, incarnation: str) -> int:
        """Remove what an incarnation that has ended leaves: record, index entry, queue and load.
        Entries that nobody has claimed are given back to their gateways; the number of them."""
        self._written.pop(incarnation, None)
        keys = self._keys
        return await self._client.call(
            scripts.RemoveNode(
                node=keys.node(incarnation),
                nodes=keys.nodes(),
                stream=keys.stream(incarnation),
                load=keys.load(incarnation),
                incarnation=incarnation,
                record_stem=keys.request(""),
                load_stem=keys.load(""),
            )
        )

    async def snapshot(self) -> Snapshot:
        """All records and their ages. A record of a newer version that cannot be read is left out
        and logged."""
        generation = await self._client.generation()
        time, reply = await self._client.pipeline(
            ("TIME",), ("ZRANGE", self._keys.nodes(), 0, -1, "WITHSCORES")
        )
        now_ms = time[0] * 1000 + time[1] / 1000
        index = scores(reply)
        ages = {name: max(0.0, (now_ms - beat_at) / 1000) for name, beat_at in index.items()}
        records = await self._records(list(index))
        return Snapshot(records, ages, generation)

    async def _records(self, incarnations: Sequence[str]) -> dict[str, NodeRecord]:
        """In two round trips where there is somebody new, else in one."""
        moments = await self._fields(incarnations, (_IDENTITY, *_OF_THE_MOMENT))
        new = [
            name
            for name, moment in moments.items()
            if name not in self._known or self._known[name][0] != moment.get(_IDENTITY)
        ]
        for name, fields in (await self._fields(new, (_IDENTITY, *_NAMES))).items():
            self._known.pop(name, None)
            if (record := record_of(fields)) is not None:
                self._known[name] = fields.get(_IDENTITY, ""), record
            moments[name] = fields
        self._known = {name: self._known[name] for name in incarnations if name in self._known}
        return {
            name: record
            for name, (_, known) in self._known.items()
            if (record := record_of(moments[name], known)) is not None
        }

    async def _fields(
        self, incarnations: Sequence[str], names: Sequence[str]
    ) -> dict[str, dict[str, str]]:
        """Of each record those fields that it has; none of one that is not there."""
        if not incarnations:
            return {}
        replies = await self._client.pipeline(
            *(("HMGET", self._keys.node(incarnation), *names) for incarnation in incarnations)
        )
        return {
            incarnation: {
                name: text(value)
                for name, value in zip(names, reply, strict=True)
                if value is not None
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


def record_of(stored: Mapping[str, str], known: NodeRecord | None = None) -> NodeRecord | None:
    """The record that these fields make, those of a life from `known` where that is given; None,
    and logged, if it cannot be read or there is none."""
    try:
        values = {name: _TYPES[name](value) for name, value in stored.items() if name in _TYPES}
        return NodeRecord(**values) if known is None else dataclasses.replace(known, **values)
    except (ValueError, TypeError) as error:
        if stored:
            log.warning("registry.unreadable", node=stored.get("incarnation"), error=error)
        return None


def _digest(values: Iterable[str]) -> str:
    return hashlib.blake2b(json.dumps(list(values)).encode(), digest_size=8).hexdigest()


def _links(stored: str) -> list[KVLink]:
    try:
        found: list[KVLink] = json.loads(stored or "[]")
    except ValueError:
        return []
    return found
