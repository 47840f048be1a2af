"""The queue of one incarnation: a Redis stream that it reads only when it has room.

Owns: reading, claiming, and deleting what is done; moving entries that nobody has read, and giving
back those that nobody has claimed. Knows nothing of what an entry costs or how it is computed. An
entry that was read and claimed stays in the stream, as pending, until `done` deletes it: so the
stream and its pending list show what waits and what is at work. They never cause a second execution:
the claim decides, and a retry is a new attempt that the gateway makes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

from common.errors import MalformedMessage, ServiceUnavailable
from common.logs import get_logger
from common.store import queue_scripts as scripts
from common.store.client import RedisClient, reply_code, text
from common.store.keys import WORK_TTL_S
from common.store.records import GROUP
from common.store.requests import Claim, Requests
from common.wire.codec import decode
from common.wire.messages import Dispatch

log = get_logger("queue")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One claimed attempt. `id` is what `done` wants. Whoever reads it adds the hashes of its full
    blocks."""

    id: str
    dispatch: Dispatch
    block_hashes: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class QueueLength:
    """What lies in a stream: entries nobody has read, and entries at work."""

    waiting: int
    at_work: int


class NodeQueue:
    """The reading side, for the one incarnation the stream is named after. Not for two tasks at
    once: `take` is called again only after it has returned."""

    strays_interval_s = 2.0  # between two looks for entries that a lost answer has left with us

    def __init__(self, client: RedisClient, incarnation: str) -> None:
        self._client = client
        self._requests = Requests(client)
        self._incarnation = incarnation
        self._stream = client.keys.stream(incarnation)
        self._in_hand: set[str] = set()
        self._over: set[str] = set()  # could not be deleted yet
        self._answer_lost = False
        self._looked_at = time.monotonic()  # for strays
        self._reading: asyncio.Future[list[tuple[str, dict[bytes, bytes] | None]]] | None = (
            None  # the read that waits for entries
        )
        self._stopped = False
        self.dropped = 0  # entries whose claim was lost, superseded or unknown, or malformed

    async def open(self) -> None:
        """Make stream and group; harmless where they exist."""
        create = ("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")
        try:
            await self._client.command(*create)
        except ServiceUnavailable as error:
            if reply_code(error) != "BUSYGROUP":
                raise
        await self._client.command("EXPIRE", self._stream, WORK_TTL_S)

    async def take(self, capacity: int, wait_s: float = 0.0) -> list[Entry]:
        """At most `capacity` attempts, claimed for us; fewer, or none, after at most `wait_s`
        (bounded by half of the time limit for Redis' answers).

        Cancelling it, or an error, loses nothing: what was read meanwhile comes with the next call.
        """
        if capacity <= 0 or self._stopped:
            return []
        if self._over:
            await self.done(())
        await self._look_for_strays()
        entries: list[tuple[str, dict[bytes, bytes] | None]] = []
        again = self._answer_lost
        if again:
            pending = await self._read("0", capacity + len(self._in_hand), 0.0)
            entries = [entry for entry in pending if entry[0] not in self._in_hand][:capacity]
        if not entries:
            again = False
            self._answer_lost = True  # until everything read is in the caller's hands
            entries = await self._read_new(capacity, wait_s)
        taken: list[Entry] = []
        for entry_id, fields in entries:
            dispatch = await self._claimed(fields)
            if dispatch is None:
                self.dropped += 1
                await self._drop(entry_id)
            else:
                taken.append(Entry(entry_id, dispatch))
        self._in_hand.update(entry.id for entry in taken)
        if not again or len(entries) < capacity:
            self._answer_lost = False
        return taken

    async def done(self, entries: Iterable[Entry]) -> None:
        """Delete entries whose attempt is over here, whatever became of it; what Redis did not
        hear of is deleted with the next call, or before the next `take`."""
        self._over.update(entry.id for entry in entries)
        ids = sorted(self._over)
        await self._delete(ids)
        self._over.difference_update(ids)
        self._in_hand.difference_update(ids)

    def over(self, entry: Entry) -> None:
        """As `done`, with the next call of it."""
        self._over.add(entry.id)

    def stop(self) -> None:
        """Take nothing more: a `take` that waits returns at once, with none; one that claims what it
        has read goes on to its end."""
        self._stopped = True
        if self._reading is not None:
            self._reading.cancel()

    async def give_back(self, target: str) -> int:
        """Move every entry that nobody has claimed to `target`, read or not; "" gives them back to
        their gateways. The number given back; 0 if there is none, or `target` has left. Call it
        once `stop` was called and no `take` is under way."""
        keys = self._client.keys
        return await self._client.call(
            scripts.GiveBack(
                stream=self._stream,
                target=keys.stream(target),
                node=target,
                record_stem=keys.request(""),
                load_stem=keys.load(""),
            )
        )

    async def _read_new(self, count: int, wait_s: float) -> list[tuple[str, dict[bytes, bytes] | None]]:
        self._reading = asyncio.ensure_future(self._read(">", count, wait_s))
        try:
            return await self._reading
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopped or (task is not None and task.cancelling()):
                self._reading.cancel()
                raise
            return []
        finally:
            self._reading = None

    async def _look_for_strays(self) -> None:
        """A read that was given up may still be served, late: then entries are ours without our
        knowledge, and what is pending is more than what is in hand."""
        if time.monotonic() - self._looked_at < self.strays_interval_s:
            return
        self._looked_at = time.monotonic()
        (length,) = await queue_lengths(self._client, [self._incarnation])
        self._answer_lost |= length.at_work > len(self._in_hand)

    async def _claimed(self, fields: dict[bytes, bytes] | None) -> Dispatch | None:
        try:
            dispatch = decode((fields or {}).get(b"dispatch", b""))
        except MalformedMessage as error:
            log.warning("queue.malformed", error=error)
            return None
        if not isinstance(dispatch, Dispatch):
            log.warning("queue.malformed", error=f"a {type(dispatch).__name__} in the queue")
            return None
        claim = await self._requests.claim(dispatch.request.id, dispatch.attempt, self._incarnation)
        if claim in (Claim.WON, Claim.HELD):
            return dispatch
        log.info("queue.dropped", request=dispatch.request.id, attempt=dispatch.attempt, claim=claim.value)
        return None

    async def _read(
        self, start: str, count: int, wait_s: float
    ) -> list[tuple[str, dict[bytes, bytes] | None]]:
        wait_ms = int(1000 * min(wait_s, self._client.settings.timeout_s / 2))
        block = ("BLOCK", wait_ms) if wait_ms > 0 else ()
        who = ("GROUP", GROUP, self._incarnation, "COUNT", count)
        what = ("STREAMS", self._stream, start)
        try:
            reply: Any = await self._client.command("XREADGROUP", *who, *block, *what)
        except ServiceUnavailable as error:
            if reply_code(error) not in ("NOGROUP", "UNBLOCKED"):
                raise
            await self.open()  # Redis lost its content, or the stream outlived its time
            return []
        return [(text(i), fields) for _, batch in reply or () for i, fields in batch]

    async def _drop(self, entry_id: str) -> None:
        keys = self._client.keys
        await self._client.call(
            scripts.DropEntries(
                stream=self._stream, record_stem=keys.request(""), load_stem=keys.load(""), ids=[entry_id]
            )
        )

    async def _delete(self, ids: Sequence[str]) -> None:
        if ids:
            await self._client.pipeline(("XACK", self._stream, GROUP, *ids), ("XDEL", self._stream, *ids))


async def move_unread(client: RedisClient, source: str, target: str, count: int) -> int:
    """Move up to `count` entries that nobody has read, oldest first, from one incarnation's stream
    to another's, loads included; the number moved. Attempts no longer wanted are deleted instead.
    Atomic: an entry is read by `source` or moved, never both; and the record names its new node.
    Nothing is moved to a node that has not opened its queue, or has left."""
    keys = client.keys
    return await client.call(
        scripts.MoveUnread(
            source=keys.stream(source),
            target=keys.stream(target),
            count=count,
            node=target,
            record_stem=keys.request(""),
            load_stem=keys.load(""),
        )
    )


async def queue_lengths(client: RedisClient, incarnations: Sequence[str]) -> list[QueueLength]:
    """Lengths of these streams, in order and in one round trip; one that does not exist is empty."""
    if not incarnations:
        return []
    streams = [client.keys.stream(incarnation) for incarnation in incarnations]
    lengths = await client.call(scripts.QueueLengths(streams=streams))
    return [QueueLength(max(0, total - at_work), at_work) for total, at_work in lengths]
