"""The lease that a node has on its GPU: claimed before anything is loaded, kept by a thread of its own.

Owns: when Redis is asked, and whether this process may compute just now. Knows neither torch nor engine.

    claim     the first candidate that nobody has; where somebody may have it whom Redis has forgotten or
              not heard of for long, it is *settled* when nobody has objected for `settle_s`
    keep      renewed every `renew_s` by a thread, whatever the node's event loop does meanwhile
    require   asked by the engine's thread before each step: returns, waits, or raises
    close     released, for the next node to have it at once

A holder that runs all the time *asserts* its lease: after FLUSHALL or a restart of Redis without memory
it is there again within `settle_s`, and whoever has claimed the GPU meanwhile, and computes nothing yet,
gives way. While Redis cannot be reached it computes on: nobody can claim anything there.

A holder that was stopped (SIGSTOP, a frozen container) for longer than `stopped_s` knows nothing: others
may compute on its GPU by now. It computes nothing before Redis has said that the lease is there still,
or claims it anew. If somebody else has it the node ends: what it has loaded lies in the other's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

from common.errors import EngineBroken, PdqError, ResourceError, ServiceUnavailable
from common.gpu import Gpu
from common.logs import get_logger
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.gpu_leases import GpuLeases, Held, Hold, Terms

log = get_logger("gpu")

ANSWER_S, RETRY_S = 1.0, 2.0  # for Redis, at most: a holder is to be heard while others wait for it
CLOSE_S = 10.0  # for the thread to release the lease


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseTimes:
    """`settle_s` is longer than any holder takes to say that it is there, with Redis' retries; `stopped_s`
    is shorter than `ttl_s`, after which others may claim."""

    ttl_s: float = 15.0
    renew_s: float = 1.0
    settle_s: float = 5.0
    stopped_s: float = 5.0


TIMES = LeaseTimes()


def now() -> float:
    """Seconds, those included in which this machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class GpuLease:
    """Made by `claim`. All methods are for any thread."""

    gpu: Gpu

    def __init__(
        self, redis: RedisSettings, host: str, holder: str, terms: Terms, times: LeaseTimes = TIMES
    ) -> None:
        self._redis = dataclasses.replace(
            redis,
            timeout_s=min(redis.timeout_s, ANSWER_S),
            retry_s=min(redis.retry_s, RETRY_S),
            max_connections=4,
        )
        self._host, self._holder, self._terms, self._times = host, holder, terms, times
        self._changed = threading.Condition()
        self._sure = False  # nobody else has it, as far as can be known
        self._awake_at = now()
        self._lost = ""  # why it is not ours any more
        self._when_lost: list[Callable[[], None]] = []
        self._claimed_at: float | None = None  # while it is not settled
        self._claimed: Future[Gpu] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end, self._closing, self._releases = asyncio.Event(), False, True
        self._thread = threading.Thread(target=self._run, name="gpu-lease", daemon=True)

    @classmethod
    def claim(
        cls,
        redis: RedisSettings,
        host: str,
        holder: str,
        candidates: Sequence[Gpu],
        terms: Terms,
        times: LeaseTimes = TIMES,
    ) -> GpuLease:
        """One of the candidates, the first that can be had. `ResourceError` if others have all of them;
        a lease that is not renewed any more is waited for. `ServiceUnavailable` if Redis is."""
        lease = cls(redis, host, holder, terms, times)
        lease._candidates = candidates
        lease._thread.start()
        try:
            lease.gpu = lease._claimed.result()
        except BaseException:
            lease.close()
            raise
        return lease

    def require(self) -> None:
        """Return once it is certain that the GPU is ours; `EngineBroken` if it is somebody else's."""
        with self._changed:
            while not self._may_compute():
                self._changed.wait(self._times.renew_s)

    def _may_compute(self) -> bool:
        if self._lost:
            raise EngineBroken(self._lost)
        return self._sure and now() - self._awake_at <= self._times.stopped_s

    async def until_lost(self) -> NoReturn:
        """`EngineBroken`, as soon as it is known."""
        loop, lost = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # that loop has ended
                loop.call_soon_threadsafe(lost.set)

        with self._changed:
            self._when_lost.append(tell)
            if self._lost:
                tell()
        await lost.wait()
        raise EngineBroken(self._lost)

    def close(self, *, release: bool = True) -> None:
        """End the thread. Without `release` the lease lasts until it is over: something of ours may still
        compute there."""
        with self._changed:
            loop, self._closing, self._releases = self._loop, True, release
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(self._end.set)
        self._thread.join(CLOSE_S)

    # The thread.

    _candidates: Sequence[Gpu] = ()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if not self._claimed.done():
                self._claimed.set_exception(error)
                return
            log.error("gpu.unkept", error=repr(error), exc_info=error)
            self._lose(f"the lease on {self.gpu} is not kept any more: {error!r}")

    async def _main(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._loop = asyncio.get_running_loop()
        client = RedisClient(self._redis, name=f"{self._holder}-gpu")
        leases = GpuLeases(
            client,
            self._host,
            self._holder,
            self._terms,
            ttl_s=self._times.ttl_s,
            settle_s=self._times.settle_s,
        )
        try:
            await client.open()
            ended = asyncio.create_task(self._end.wait())
            claiming = asyncio.create_task(self._claim(leases))
            await asyncio.wait((ended, claiming), return_when=asyncio.FIRST_COMPLETED)
            if not claiming.done():
                claiming.cancel()
                await asyncio.wait((claiming,))
                return
            gpu = claiming.result()
            log.info("gpu.claimed", gpu=gpu.index, name=gpu.name, uuid=gpu.uuid, shared=self._terms.shared)
            self.gpu = gpu
            self._sure = True
            self._claimed.set_result(gpu)
            coroutines: tuple[Coroutine[Any, Any, None], ...] = (self._stay_awake(), self._keep(leases, gpu))
            tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
            done, _ = await asyncio.wait((ended, *tasks), return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for duty in done - {ended}:
                duty.result()
            if self._releases and not self._lost:
                await self._release(leases, gpu)
        finally:
            await client.close()

    async def _release(self, leases: GpuLeases, gpu: Gpu) -> None:
        try:
            await leases.release(gpu.uuid)
        except PdqError as error:
            log.warning("gpu.unreleased", gpu=gpu.index, error=error)  # it ends by itself

    # Claiming.

    async def _claim(self, leases: GpuLeases) -> Gpu:
        seen: dict[tuple[str, str], int] = {}  # of a GPU and a holder: when its lease was to end at first
        begun = now()
        while True:
            kept: dict[Gpu, list[str]] = {}  # by whom, of those GPUs whose lease somebody renews
            for gpu in self._candidates:
                self._awake_at = now()
                held, holders = await leases.hold(gpu.uuid, Hold.CLAIM)
                if held is Held.SETTLED:
                    return gpu
                if held is not Held.TAKEN:
                    if await self._settle(leases, gpu):
                        return gpu
                    continue
                if any(ends > seen.setdefault((gpu.uuid, name), ends) for name, ends in holders.items()):
                    kept[gpu] = sorted(holders)
            if len(kept) == len(self._candidates):
                raise _none_left(kept, self._terms)
            if now() - begun > 2 * self._times.ttl_s + len(self._candidates) * self._times.settle_s:
                raise ResourceError("no GPU could be claimed: others come and go too fast", param="device")
            await asyncio.sleep(self._times.renew_s / 4)

    async def _settle(self, leases: GpuLeases, gpu: Gpu) -> bool:
        """Wait whether somebody objects, who has it all the time and Redis had forgotten."""
        since = now()
        try:
            while True:
                await asyncio.sleep(self._times.renew_s / 2)
                self._awake_at = asked = now()
                how = Hold.SETTLE if asked - since >= self._times.settle_s else Hold.CLAIM
                held, _ = await leases.hold(gpu.uuid, how)
                if held is Held.TAKEN:
                    return False
                if held is Held.FRESH or now() - asked > self._times.stopped_s:
                    since = now()
                elif held is Held.SETTLED:
                    return True
        except asyncio.CancelledError:
            await self._release(leases, gpu)
            raise

    # Keeping.

    async def _stay_awake(self) -> NoReturn:
        """Find out that this process was stopped. Waits for nothing, so that a Redis that does not answer
        is not mistaken for it."""
        while True:
            with self._changed:
                if now() - self._awake_at > self._times.stopped_s:
                    self._doubt()
                self._awake_at = now()
                self._changed.notify_all()
            await asyncio.sleep(self._times.stopped_s / 8)

    def _doubt(self) -> None:
        log.warning("gpu.stopped", gpu=self.gpu.index, seconds=round(now() - self._awake_at, 1))
        self._sure, self._claimed_at = False, None

    async def _keep(self, leases: GpuLeases, gpu: Gpu) -> None:
        """Renew until it is lost."""
        unreachable = False
        while not self._lost:
            await asyncio.sleep(self._times.renew_s)
            try:
                await self._renew(leases, gpu)
                unreachable = False
            except ServiceUnavailable as error:
                if not unreachable:
                    log.warning("gpu.unrenewed", gpu=gpu.index, error=error)
                unreachable = True

    async def _renew(self, leases: GpuLeases, gpu: Gpu) -> None:
        asked = now()
        with self._changed:
            if asked - self._awake_at > self._times.stopped_s:
                self._doubt()
            how = Hold.ASSERT if self._sure else Hold.CLAIM
            if self._claimed_at is not None and asked - self._claimed_at >= self._times.settle_s:
                how = Hold.SETTLE
        held, holders = await leases.hold(gpu.uuid, how)
        with self._changed:
            if held is Held.TAKEN:
                names = ", ".join(sorted(holders))
                self._lose(f"{gpu} was given to {names} while this node was stopped, or Redis out of reach")
            elif now() - asked > self._times.stopped_s or (how is Hold.ASSERT and not self._sure):
                self._sure, self._claimed_at = False, None  # an answer from before a stop says nothing
            elif held is Held.SETTLED:
                if not self._sure:
                    log.info("gpu.kept", gpu=gpu.index)
                self._sure, self._claimed_at = True, None
                self._changed.notify_all()
            elif held is Held.FRESH or self._claimed_at is None:
                self._claimed_at = now()

    def _lose(self, why: str) -> None:
        with self._changed:
            self._lost = why
            self._changed.notify_all()
            for tell in self._when_lost:
                tell()
        log.error("gpu.lost", why=why)


def _none_left(kept: dict[Gpu, list[str]], terms: Terms) -> ResourceError:
    who = "; ".join(f"{gpu} by {', '.join(names)}" for gpu, names in kept.items())
    way = (
        f"they share none, or have more than the {terms.permille / 10:g}% of its memory for this node leave: "
        "lower --gpu-memory-utilization"
        if terms.shared
        else "start fewer nodes, end one of these, or let nodes share a GPU (--share-gpu, with a lower "
        "--gpu-memory-utilization, on each of them)"
    )
    count = "the GPU is" if len(kept) == 1 else f"all {len(kept)} GPUs are"
    return ResourceError(f"no GPU is left: {count} held, {who}; {way}", param="device")
