"""The gateway's process: settings, then Redis, bus, HTTP, then the way back in reverse.

First signal: no new requests, open ones finish within the grace period, then they fail. Second
signal: they fail at once. Either way their clients and the nodes are told.
An error at start is one line and exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

from common.background import report
from common.descriptors import room_for
from common.errors import ConfigError, PdqError, ResourceError, ServiceUnavailable
from common.garbage import keep_what_is_here
from common.logs import configure, get_logger
from common.metrics import Metrics
from common.settings.config import GatewaySettings, load
from common.store.client import RedisClient
from common.store.reaper import Reaper
from common.store.registry import NodeRecord, NodeState, Registry, Role, new_incarnation
from common.store.requests import Requests
from common.version import version
from common.wire.bus import Bus
from common.wire.bus_setup import with_bus
from common.wire.senders import TO_GATEWAYS
from gateway.access import Access
from gateway.app import create_app
from gateway.dispatch import Dispatcher
from gateway.intake.pool import Intake
from gateway.intake.process import Forker
from gateway.metrics import GatewayMetrics
from gateway.node_links import NodeLinks
from gateway.placement import DispatchLimits
from gateway.prefix_index import PrefixIndex
from gateway.record_store import RecordStore
from gateway.replays import Replays
from gateway.router import LeastLoadedRouter
from gateway.served_models import ServedModels, load_models
from gateway.server import Server
from gateway.service import Service, ServiceLimits

OTHER_DESCRIPTORS = 192  # Redis, links to nodes, connections that are being refused, files
FEWEST_CONNECTIONS = 32

log = get_logger("gateway")


async def run(settings: GatewaySettings, incarnation: str, models: ServedModels, forker: Forker) -> None:
    """Serve until a signal comes. Raises `PdqError` for what keeps it from starting."""
    access = Access.of(settings)
    connections = room_for(settings.http.max_connections, OTHER_DESCRIPTORS, FEWEST_CONNECTIONS, "a gateway")
    names = ",".join(model.name for model in models)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(settings))
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        redis = RedisClient(settings.redis, name=incarnation)
        stack.push_async_callback(redis.close)
        await redis.open()
        settings = await asyncio.to_thread(with_bus, settings, os.environ)
        bus = Bus(incarnation, settings.bus, hears=TO_GATEWAYS)
        stack.push_async_callback(bus.close)
        await bus.start()
        registry, requests = Registry(redis), Requests(redis)
        index = PrefixIndex()
        links = NodeLinks(bus, registry, requests, index)
        metrics = GatewayMetrics(Metrics())
        metrics.show_links(bus, links)
        dispatcher = Dispatcher(
            gateway=incarnation,
            store=RecordStore(requests),
            bus=links,
            directory=links,
            router=LeastLoadedRouter(index, decode_prompt_tokens=settings.decode_prompt_tokens),
            limits=DispatchLimits(
                max_attempts=settings.max_attempts,
                max_open=settings.max_open_requests,
                request_timeout_s=settings.request_timeout_s,
                placement_timeout_s=settings.placement_timeout_s,
            ),
            metrics=metrics,
        )
        links.inbox, links.on_redis_lost = dispatcher, dispatcher.reassert
        limits = ServiceLimits(
            max_body_bytes=settings.max_body_bytes,
            max_bodies_bytes=settings.max_bodies_bytes,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_n=settings.max_n,
            max_prompts=settings.max_prompts,
            unknown_fields=settings.unknown_fields,
        )
        intake = Intake(models, forker, settings.intake_processes)
        stack.callback(intake.close)
        service = Service(models, intake, dispatcher, limits, metrics, access)
        metrics.show_bodies(service.bodies)
        record = NodeRecord(
            incarnation=incarnation,
            name=incarnation.rpartition("-")[0],
            role=Role.GATEWAY,
            state=NodeState.READY,
            endpoint=bus.endpoint,
            url=url,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=int(time.time() * 1000),
            version=version(),
            model=names,
        )
        http = dataclasses.replace(settings.http, max_connections=connections)
        server = Server(create_app(service), http, settings.grace_period_s)
        _handle_signals(server, service, settings.grace_period_s)
        background = [
            asyncio.create_task(links.run(), name="links"),
            asyncio.create_task(_announce(registry, service, record), name="announce"),
            asyncio.create_task(Reaper(redis, incarnation).run(), name="reaper"),
            asyncio.create_task(Replays(requests, dispatcher).run(), name="replays"),
        ]
        for task in background:
            task.add_done_callback(report)
        keep_what_is_here()
        log.info("gateway.listening", url=url, model=names, bus=bus.endpoint)
        try:
            await server.serve(sockets=[listener])
        finally:
            await dispatcher.shut_down()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            with contextlib.suppress(ServiceUnavailable):
                await registry.leave(incarnation)
        log.info("gateway.ended")
        if server.failure is not None:
            raise server.failure


def _listen(settings: GatewaySettings) -> socket.socket:
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        advice = "is taken; --port names another" if error.errno == errno.EADDRINUSE else f": {error}"
        raise ResourceError(f"port {port} of {host} {advice}", param="port") from error
    try:  # a host name may resolve to a place beyond loopback
        dataclasses.replace(settings, host=listener.getsockname()[0])
    except ConfigError:
        listener.close()
        raise
    return listener


def _handle_signals(server: Server, service: Service, grace_period_s: float) -> None:
    loop = asyncio.get_running_loop()
    dispatcher = service.dispatcher

    def force() -> None:
        log.warning("gateway.forced", open=dispatcher.num_open)
        error = ServiceUnavailable("this gateway ends")
        dispatcher.fail_all(error)
        service.intake.close()
        server.end(error)

    def on_signal() -> None:
        if service.draining:
            force()
            return
        log.info("gateway.draining", open=dispatcher.num_open)
        service.draining = True
        server.should_exit = True
        loop.call_later(grace_period_s, force)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)


async def _announce(registry: Registry, service: Service, record: NodeRecord) -> None:
    """Write this gateway's record, once per beat."""
    for beats in range(sys.maxsize):
        state = NodeState.DRAINING if service.draining else NodeState.READY
        now = dataclasses.replace(record, state=state, running=service.dispatcher.num_open, beats=beats)
        with contextlib.suppress(ServiceUnavailable):
            await registry.announce(now)
        await asyncio.sleep(1.0)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = load(
            GatewaySettings, sys.argv[1:] if argv is None else argv, os.environ, program="gateway"
        )
        name = settings.name or f"gateway-{socket.gethostname().split('.')[0]}"
        incarnation = new_incarnation(name)
        configure(incarnation, settings.log.level)
        models = load_models(settings)
        with contextlib.closing(Forker(models)) as forker:  # before the loop and its threads
            asyncio.run(run(settings, incarnation, models, forker))
    except PdqError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
