"""Every key that `pdq` has in Redis, spelled by a named method that says what it is.

Owns: names, types and times to live. Knows nothing of what is in them (requests.py, queue.py,
registry.py and reaper.py do). `redis-cli --scan --pattern 'pdq:*'` is meant to be read by a person.

Times to live of work outlast any outage by far: they are the last resort against litter, never a
means to conclude anything. The permanent keys are few, and bounded in size.
"""

from __future__ import annotations

from typing import NewType

Key = NewType("Key", str)
"""A key, or the stem of a family: nothing but `Keys` makes one."""

SCHEMA = "2"
"""Version of names and contents; a Redis that carries another one is refused."""

WORK_TTL_S = 24 * 3600
INSPECT_TTL_S = 600
NODE_TTL_S = 3600
REAPER_LOCK_TTL_S = 30
GPU_LEASE_TTL_S = 3600

RECENT_REQUESTS = 10_000
DEAD_LETTERS = 1_000


class Keys:
    """Key names under one prefix. A method called with an empty argument gives the stem of its
    family, which scripts complete with names that only they read."""

    def __init__(self, prefix: str = "pdq") -> None:
        self.prefix = prefix

    def node(self, incarnation: str) -> Key:
        """Who a node or gateway is, and its KV links. Hash; NODE_TTL_S, renewed by every beat. Written
        at the start and where something of it changes. Writer: its own incarnation; deleted by it or
        by the reaper. Readers: everyone, once. Where it is missing, those who know it go on with what
        they know, others do not see the incarnation, and its next beat writes all of it."""
        return self._key("node", incarnation)

    def beat(self, incarnation: str) -> Key:
        """Its numbers of the moment, and the digest of the identity that they belong to. Hash;
        NODE_TTL_S, renewed by every beat. Writer: its own incarnation; deleted with the identity.
        Readers: everyone, at each beat of their own. Where it is missing and `node` is there, the
        incarnation counts as starting, and its age (`nodes`) says whether it is dead."""
        return self._key("beat", incarnation)

    def nodes(self) -> Key:
        """Incarnation → unix ms of its last beat. Sorted set; permanent, one entry each.
        Writer: each incarnation; the reaper removes the dead. Readers: everyone."""
        return self._key("nodes")

    def stream(self, incarnation: str) -> Key:
        """Attempts that wait for one incarnation. Stream with the group "node"; WORK_TTL_S, renewed
        by every write. Writer: gateways; whoever moves unread entries. Reader: that incarnation,
        which deletes what is done; the reaper deletes the stream of a dead one."""
        return self._key("stream", incarnation)

    def request(self, request: str) -> Key:
        """Record of one request. Hash; WORK_TTL_S while open, INSPECT_TTL_S once closed.
        Writer: its gateway; a claim by a node; the reaper. Readers: everyone."""
        return self._key("request", request)

    def requests(self) -> Key:
        """Ids of the latest RECENT_REQUESTS requests → unix ms of acceptance, for people. Sorted
        set; permanent. Writer: gateways; the reaper drops ids without a record. Reader: `pdq`."""
        return self._key("requests")

    def open_requests(self, gateway: str) -> Key:
        """Ids of the requests a gateway incarnation has to answer. Set; WORK_TTL_S, renewed by
        every write. Writer: that gateway. Readers: it, and the reaper when it is dead."""
        return self._key("open", gateway)

    def load(self, incarnation: str) -> Key:
        """Work given to one incarnation and not finished: `requests`, `prompt_tokens`. Hash;
        WORK_TTL_S, renewed by every write; absent when idle. Writer: gateways, by the scripts that
        write the record too. Readers: routers."""
        return self._key("load", incarnation)

    def dead_letters(self) -> Key:
        """Requests that brought a node down while alone. Stream of at most DEAD_LETTERS entries;
        permanent. Writer: gateways. Reader: people."""
        return self._key("dead_letters")

    def requeued(self) -> Key:
        """Dead letters to compute once more: encoded dispatches. List; WORK_TTL_S, renewed by every
        write. Writer: `pdq queue requeue`. Readers: gateways, each takes what it runs."""
        return self._key("requeued")

    def reaper_lock(self) -> Key:
        """Name of the one reaper at work. String; REAPER_LOCK_TTL_S.
        Writer and reader: reapers."""
        return self._key("reaper")

    def gpu(self, host: str, uuid: str) -> Key:
        """Who computes on one GPU of one host (gpu_scripts.py), one holder or several that share it.
        Hash; GPU_LEASE_TTL_S, renewed about every second by each holder; a lease in it is over much
        sooner. Writer: nodes that hold it or look for one. Readers: they."""
        return self._key("gpu", host, uuid)

    def gpus_since(self) -> Key:
        """Unix ms since when leases are not forgotten here: gone with the content, as `epoch`. String;
        permanent. Writer: whoever finds it absent. Readers: nodes that look for a GPU."""
        return self._key("gpus_since")

    def schema(self) -> Key:
        """SCHEMA of whoever came first. String; permanent. Writer and reader: every client."""
        return self._key("schema")

    def epoch(self) -> Key:
        """A random name of this content's life: gone with the content, after FLUSHALL or a restart
        without persistence. String; permanent. Writer: whoever finds it absent. Readers: gateways,
        which then assert their open requests again."""
        return self._key("epoch")

    def permanent(self) -> frozenset[Key]:
        """The only keys that may lack a time to live."""
        return frozenset(
            {
                self.nodes(),
                self.requests(),
                self.dead_letters(),
                self.schema(),
                self.epoch(),
                self.gpus_since(),
            }
        )

    def _key(self, *parts: str) -> Key:
        return Key(":".join((self.prefix, *parts)))
