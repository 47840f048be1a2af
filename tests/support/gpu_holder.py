"""A process that claims one of COUNT pretended GPUs, and computes on it as often as it may.

`python -m tests.support.gpu_holder REDIS_URL NAME COUNT`. It says a line each time: `holds INDEX`; `step` for
each step that it computes, on a line of input; at the end `lost` or `refused` and why.
"""

from __future__ import annotations

import sys

from common.errors import EngineBroken, ResourceError
from common.gpu import Gpu
from common.node.gpu_lease import GpuLease, LeaseTimes
from common.settings.config import RedisSettings
from common.store.gpu_leases import Terms

HOST = "host-1"
# Far enough apart for machines that are busy with other tests.
TIMES = LeaseTimes(ttl_s=3.0, renew_s=0.1, settle_s=0.6, stopped_s=1.2)


def gpus(count: int) -> list[Gpu]:
    return [Gpu(index, f"GPU-{index:04}", "Pretended", 80 << 30) for index in range(count)]


def hold(url: str, name: str, count: str) -> None:
    try:
        lease = GpuLease.claim(RedisSettings(url=url), HOST, name, gpus(int(count)), Terms(900), TIMES)
    except ResourceError as error:
        print("refused", error, flush=True)
        return
    print("holds", lease.gpu.index, flush=True)
    for _ in sys.stdin:
        try:
            lease.require()
        except EngineBroken as error:
            print("lost", error, flush=True)
            return
        print("step", flush=True)
    lease.close()


if __name__ == "__main__":
    hold(*sys.argv[1:])
