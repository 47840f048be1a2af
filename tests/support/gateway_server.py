"""A real uvicorn server on loopback around a gateway whose nodes are a `FakeCluster`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from common.metrics import Metrics
from common.model_folder.description import describe_model
from common.settings.config import HTTPSettings
from gateway.access import Access
from gateway.app import create_app
from gateway.connection import Roster
from gateway.dispatch import Dispatcher
from gateway.intake.limits import INTAKE_LIMITS, IntakeLimits
from gateway.intake.pool import Intake
from gateway.intake.process import Forker
from gateway.metrics import GatewayMetrics
from gateway.placement import DispatchLimits
from gateway.prefix_index import PrefixIndex
from gateway.router import LeastLoadedRouter
from gateway.served_models import ServedModel, ServedModels
from gateway.server import Server
from gateway.service import Service, ServiceLimits
from gateway.tokenizer import Tokenizer
from tests.support.fake_cluster import MODEL, FakeCluster, until

LIMITS, SERVICE_LIMITS, HTTP = DispatchLimits(), ServiceLimits(), HTTPSettings()
MODELS = Path(__file__).parents[3] / "shared" / "models"


@dataclasses.dataclass(slots=True)
class Served:
    """A gateway that listens at `url`."""

    url: str
    service: Service
    cluster: FakeCluster
    connections: Roster

    @property
    def dispatcher(self) -> Dispatcher:
        return self.service.dispatcher


@functools.cache
def load_tokenizer(model: str) -> Tokenizer:
    return Tokenizer(describe_model(MODELS / model))


def make_service(
    cluster: FakeCluster,
    model: str = "stories260K",
    *,
    service_limits: ServiceLimits = SERVICE_LIMITS,
    limits: DispatchLimits = LIMITS,
    further: tuple[ServedModel, ...] = (),
    access: Access | None = None,
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
    intake = Intake(models, LazyForker(models), 2)
    return Service(models, intake, dispatcher, service_limits, metrics, access or Access())


class LazyForker(Forker):
    """Forks when the first worker is wanted: most tests want none. Its workers do not wait for spare
    time, of which there is little where tests run, unless that is what is tested."""

    def __init__(
        self, models: ServedModels, limits: IntakeLimits = INTAKE_LIMITS, *, has_spare_time: bool = False
    ) -> None:
        self._models, self.limits, self._has_spare_time = models, limits, has_spare_time
        self._started = False

    def worker(self, *, in_spare_time: bool = False) -> socket.socket:
        if not self._started:
            self._started = True
            self._fork()
        return super().worker(in_spare_time=in_spare_time and self._has_spare_time)

    def close(self) -> None:
        if self._started:
            super().close()


class AttentiveServer(Server):
    """Ends when it is told to; uvicorn looks ten times a second."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110  (whoever sets it tells nobody)
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def listening(service: Service, http: HTTPSettings = HTTP) -> AsyncIterator[tuple[str, Roster]]:
    """The service over HTTP: its URL and its connections."""
    server = AttentiveServer(create_app(service), http)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or serving.done())
        try:
            yield f"http://127.0.0.1:{port}", server.roster
        finally:
            server.should_exit = True
            await serving
            service.intake.close()


@contextlib.asynccontextmanager
async def serving(
    cluster: FakeCluster,
    model: str = "stories260K",
    *,
    service_limits: ServiceLimits = SERVICE_LIMITS,
    limits: DispatchLimits = LIMITS,
    further: tuple[ServedModel, ...] = (),
    http: HTTPSettings = HTTP,
    access: Access | None = None,
) -> AsyncIterator[Served]:
    """Serve, and afterwards see that nothing is left: no request, no computation, no record."""
    service = make_service(
        cluster, model, service_limits=service_limits, limits=limits, further=further, access=access
    )
    async with listening(service, http) as (url, connections):
        yield Served(url, service, cluster, connections)
    cluster.release()
    await until(lambda: cluster.running == 0)
    await service.dispatcher.shut_down()
    assert service.dispatcher.num_open == 0
    cluster.assert_idle()
