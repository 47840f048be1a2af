"""Leases on the GPUs of one host, in Redis: who may compute where, among the nodes of one system.

Owns: what a lease says, and how long it lasts. Decides nothing: HoldGpu does, in Redis, and
common/node/gpu_lease.py when to ask. A host is what containers share, hence no host name.
"""

from __future__ import annotations

import dataclasses

from common.store.client import RedisClient
from common.store.gpu_scripts import Held, Hold, HoldGpu, ReleaseGpu
from common.store.keys import GPU_LEASE_TTL_S

__all__ = ["GpuLeases", "Held", "Hold", "Terms"]


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """On which a holder has a GPU: `permille` of its memory, and beside others that share it, or alone."""

    permille: int
    shared: bool = False


class GpuLeases:
    """Those of one holder."""

    def __init__(
        self, client: RedisClient, host: str, holder: str, terms: Terms, *, ttl_s: float, settle_s: float
    ) -> None:
        """A lease is over `ttl_s` after it was renewed; whoever has one says so again within `settle_s`
        if Redis forgets it."""
        self._client, self._host, self._holder, self._terms = client, host, holder, terms
        self._ttl_ms, self._settle_ms = int(1000 * ttl_s), int(1000 * settle_s)

    async def hold(self, uuid: str, how: Hold) -> tuple[Held, dict[str, int]]:
        """Take or keep one; with the holders if it is taken, and the unix ms at which they end.
        `ServiceUnavailable` if Redis does not answer."""
        held, holders = await self._client.call(
            HoldGpu(
                gpu=self._client.keys.gpu(self._host, uuid),
                since=self._client.keys.gpus_since(),
                holder=self._holder,
                shared=self._terms.shared,
                permille=self._terms.permille,
                how=how,
                ttl_ms=self._ttl_ms,
                settle_ms=self._settle_ms,
                kept_s=GPU_LEASE_TTL_S,
            )
        )
        return held, dict(holders)

    async def release(self, uuid: str) -> None:
        """Let others have it. Without one there is nothing to do."""
        key = self._client.keys.gpu(self._host, uuid)
        await self._client.call(ReleaseGpu(gpu=key, holder=self._holder))
