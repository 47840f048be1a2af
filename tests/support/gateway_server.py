"""A real uvicorn server on loopback around a gateway whose nodes are a `FakeCluster`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn

from common.metrics import Metrics
from gateway.app import create_app
from gateway.dispatch import Dispatcher, Limits
from gateway.metrics import GatewayMetrics
from gateway.prefix_index import PrefixIndex
from gateway.router import LeastLoadedRouter
from gateway.served_models import ServedModel, ServedModels
from gateway.service import Service, ServiceLimits
from gateway.tokenizer import Tokenizer
from tests.support.fake_cluster import MODEL, FakeCluster, until

LIMITS, SERVICE_LIMITS = Limits(), ServiceLimits()
MODELS = Path(__file__).parents[3] / "shared" / "models"


@dataclasses.dataclass(slots=True)
class Served:
    """A gateway that listens at `url`."""

    url: str
    service: Service
    cluster: FakeCluster

    @property
    def dispatcher(self) -> Dispatcher:
        return self.service.dispatcher


@functools.cache
def load_tokenizer(model: str) -> Tokenizer:
    return Tokenizer(MODELS / model)


def make_service(
    cluster: FakeCluster,
    model: str = "stories260K",
    *,
    service_limits: ServiceLimits = SERVICE_LIMITS,
    limits: Limits = LIMITS,
    further: tuple[ServedModel, ...] = (),
) -> Service:
    metrics = GatewayMetrics(Metrics())
    dispatcher = Dispatcher(
        gateway="g1",
        store=cluster,
        bus=cluster,
        directory=cluster,
        router=LeastLoadedRouter(PrefixIndex()),
        limits=limits,
        metrics=metrics,
    )
    cluster.inbox = dispatcher
    models = ServedModels([ServedModel(MODEL, load_tokenizer(model)), *further])
    return Service(models, dispatcher, service_limits, metrics)


@contextlib.asynccontextmanager
async def listening(service: Service) -> AsyncIterator[str]:
    """The service over HTTP; its URL."""
    config = uvicorn.Config(
        create_app(service), lifespan="off", log_level="warning", ws="none", access_log=False
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or serving.done())
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def serving(
    cluster: FakeCluster,
    model: str = "stories260K",
    *,
    service_limits: ServiceLimits = SERVICE_LIMITS,
    limits: Limits = LIMITS,
    further: tuple[ServedModel, ...] = (),
) -> AsyncIterator[Served]:
    """Serve, and afterwards see that nothing is left: no request, no computation, no record."""
    service = make_service(
        cluster, model, service_limits=service_limits, limits=limits, further=further
    )
    async with listening(service) as url:
        yield Served(url, service, cluster)
    cluster.release()
    await until(lambda: cluster.running == 0)
    await service.dispatcher.shut_down()
    assert service.dispatcher.num_open == 0
    cluster.assert_idle()
