"""A node's process: settings, cores, model, then `Node.run` until a signal comes.

First signal: drain and end. Second: end at once. An error at start is one line and exit code 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from common.descriptors import require
from common.errors import EngineBroken, PdqError
from common.garbage import importing, keep_what_is_here
from common.logs import configure, get_logger
from common.settings.config import NodeSettings, load
from common.wire.bus_setup import with_bus

log = get_logger("node")

# How often an OpenMP thread looks before it sleeps at a barrier, some 0.1 ms: long enough for the
# end of an even share of work, short enough to give the core up when its partner lost its own to
# another process (OpenMP's default, 300,000, then burns a core for nothing).
OMP_SPIN = "10000"
FEWEST_DESCRIPTORS = 256  # links to peers, shared memory, weights, Redis


def main(argv: Sequence[str] | None = None, **parts: Any) -> int:
    """`parts` are for a node of other parts, as `Node` takes them."""
    try:
        settings = load(NodeSettings, sys.argv[1:] if argv is None else argv, os.environ, program="node")
        configure(settings.name or settings.role, settings.log.level)
        require(FEWEST_DESCRIPTORS, "a node")
        if settings.engine.cores:
            os.sched_setaffinity(0, settings.engine.cores)
        os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN)
        asyncio.run(_serve(settings, parts))
    except EngineBroken as error:
        print(f"node: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread that hangs, or a device that is lost, can be waited for in vain
    except PdqError as error:
        print(f"node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(settings: NodeSettings, parts: dict[str, Any]) -> None:
    with importing():  # torch comes in here, after the cores are bound
        from common.node.app import Node

    node = Node(with_bus(settings, os.environ), **parts)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, node.stop)
    await node.run(when_warm=keep_what_is_here)


if __name__ == "__main__":
    sys.exit(main())
