"""Who is there: records of nodes and gateways in Redis, each written by its own incarnation.

Owns: the record and its age. Concludes nothing from them: a record that is old or missing means
that Redis has not heard of the incarnation, for which Redis itself may be the reason. Death is what
a peer sees on its link (bus.py): loss, or beats without progress.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import re
import secrets
import typing
from collections.abc import AsyncIterator, Mapping
from typing import Any

from common import redis_scripts as scripts
from common.errors import ConfigError, ServiceUnavailable
from common.kv_layout import Fingerprint
from common.logs import get_logger
from common.redis_client import RedisClient, scores, text
from common.redis_keys import NODE_TTL_S

log = get_logger("registry")

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
    DEAD = "dead"  # says so itself: its engine has failed, the process is about to end


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
    transports: str = ""  # with commas, preferred first
    kv_links: str = ""  # JSON: [{link, peer, transport, reason, direction}]
    block_size: int = 0
    slab_bytes: int = 0
    num_blocks: int = 0
    max_num_seqs: int = 0
    max_model_len: int = 0
    # from here on, numbers of the moment
    waiting: int = 0
    running: int = 0
    free_blocks: int = 0
    open_attempts: int = 0  # requests of which this node still has something
    leases: int = 0  # of blocks that a peer may still read
    reserved: int = 0  # prompts with room here that are on their way
    unacknowledged: int = 0  # choices whose gateway has not acknowledged all tokens
    steps: int = 0
    beats: int = 0

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            self.model, self.revision, self.layout, self.numerics, self.block_size, self.adapter
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """All records at one moment. `ages` are seconds since each one's last beat, on Redis' clock;
    `generation` changes when Redis lost content (RedisClient.generation)."""

    records: dict[str, NodeRecord]
    ages: dict[str, float]
    generation: str

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
    """Reads all records, writes those it is given. Holds no state; any number may exist."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._keys = client.keys

    async def announce(self, record: NodeRecord) -> None:
        """Write the whole record and renew its time to live: registration, every beat, and the
        return after Redis lost its content are the same thing."""
        pairs = [
            part
            for field in dataclasses.fields(record)
            for part in (field.name, str(getattr(record, field.name)))
        ]
        await self._client.call(
            scripts.ANNOUNCE,
            [self._keys.node(record.incarnation), self._keys.nodes()],
            [record.incarnation, NODE_TTL_S, *pairs],
        )

    async def leave(self, incarnation: str) -> None:
        """Remove what an incarnation that ends in order leaves: record, index entry, empty queue
        and load. What gateways still have open is theirs."""
        await self._client.pipeline(
            ("DEL", self._keys.node(incarnation)),
            ("ZREM", self._keys.nodes(), incarnation),
            ("DEL", self._keys.stream(incarnation), self._keys.load(incarnation)),
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
        stored = await self._client.pipeline(
            *(("HGETALL", self._keys.node(incarnation)) for incarnation in index)
        ) if index else []  # fmt: skip
        ages = {name: max(0.0, (now_ms - beat_at) / 1000) for name, beat_at in index.items()}
        records = {
            name: record
            for name, fields in zip(index, stored, strict=True)
            if (record := record_of(fields))
        }
        return Snapshot(records, ages, generation)

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


def record_of(reply: Mapping[bytes, bytes]) -> NodeRecord | None:
    """The record in a reply to HGETALL; None, and logged, if it cannot be read or there is none."""
    stored = {text(name): text(value) for name, value in reply.items()}
    hints = typing.get_type_hints(NodeRecord)
    values: dict[str, Any] = {}
    try:
        for field in dataclasses.fields(NodeRecord):
            if field.name in stored:
                values[field.name] = hints[field.name](stored[field.name])
        return NodeRecord(**values)
    except (ValueError, TypeError) as error:
        if stored:
            log.warning("registry.unreadable", node=stored.get("incarnation"), error=error)
        return None
