"""What an incarnation says of itself: who it is, and its numbers of the moment.

Owns: the fields of both, their types, and how they stand in Redis. Knows nothing of who writes and
reads them (registry.py). A new field is one line here, with a default; a reader of an older version
ignores it. Types: text, int, or one of the enums.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.kv_layout import Fingerprint
from common.logs import get_logger

log = get_logger("registry")


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"
    GATEWAY = "gateway"


class NodeState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # takes nothing new


@dataclasses.dataclass(frozen=True)
class Identity:
    """What stays as it is, but for a change of role, state or proposer."""

    incarnation: str
    name: str
    role: Role
    state: NodeState = NodeState.STARTING
    endpoint: str = ""  # where its bus listens
    url: str = ""  # where its HTTP listens, if any
    host: str = ""
    device: str = ""  # where it computes: cpu, or cuda:N as that process counts
    gpu: str = ""  # its name in every process of the host, of which the node has a lease
    gpu_name: str = ""
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
    draft: str = ""
    transports: str = ""  # with commas, preferred first
    block_size: int = 0
    slab_bytes: int = 0
    num_blocks: int = 0
    max_num_seqs: int = 0
    max_model_len: int = 0
    speculative: str = ""  # what drafts tokens here; "" where nothing does, or none any more

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            self.model,
            self.revision,
            self.layout,
            self.numerics,
            self.block_size,
            self.adapter,
            self.tokenizer,
            self.draft,
        )


@dataclasses.dataclass(frozen=True)
class Beat:
    """The numbers that every beat says anew."""

    waiting: int = 0
    running: int = 0
    free_blocks: int = 0
    unfilled_slots: int = 0  # of blocks in use: reserved, without a token
    open_attempts: int = 0  # requests of which this node still has something
    leases: int = 0  # of blocks that a peer may still read
    reserved: int = 0  # prompts with room here that are on their way
    unacknowledged: int = 0  # choices whose gateway has not acknowledged all tokens
    steps: int = 0
    drafts: int = 0  # of one sequence in one step
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of these
    saved_ms: int = 0  # engine time that drafts saved, estimated; below 0: cost
    beats: int = 0
    alone: str = ""  # request/attempt@position: whose own step computes just now, up to where


@dataclasses.dataclass(frozen=True)
class NodeRecord(Beat, Identity):
    """Both together, as readers have them."""


IDENTITY = tuple(field.name for field in dataclasses.fields(Identity))
BEAT = tuple(field.name for field in dataclasses.fields(Beat))
_TYPES: dict[str, Any] = typing.get_type_hints(NodeRecord)  # costs 0.3 ms

identity_of: Callable[[NodeRecord], tuple[object, ...]] = operator.attrgetter(*IDENTITY)
beat_of: Callable[[NodeRecord], tuple[object, ...]] = operator.attrgetter(*BEAT)


def digest_of(identity: Sequence[object]) -> str:
    """What a beat names the identity with that it belongs to."""
    stored = json.dumps([str(value) for value in identity])
    return hashlib.blake2b(stored.encode(), digest_size=8).hexdigest()


def identity_from(stored: Mapping[str, str]) -> NodeRecord | None:
    """The record without a beat that these fields make: `starting`, whatever it says; None, and logged,
    if they cannot be read, or there are none."""
    try:
        values = {name: _TYPES[name](stored[name]) for name in IDENTITY if name in stored}
        return NodeRecord(**values)
    except (ValueError, TypeError) as error:
        if stored:
            log.warning("registry.unreadable", node=stored.get("incarnation"), error=error)
        return None


def joined(identity: NodeRecord, beat: Sequence[str | bool]) -> NodeRecord | None:
    """The record with the values of a beat, in the order of BEAT; a field that was not there is no text,
    and keeps its default. None, and logged, if they cannot be read."""
    try:
        values = {
            name: _TYPES[name](value)
            for name, value in zip(BEAT, beat, strict=True)
            if isinstance(value, str)
        }
    except ValueError as error:
        log.warning("registry.unreadable", node=identity.incarnation, error=error)
        return None
    return dataclasses.replace(identity, **values)
