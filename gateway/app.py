"""The web application: one `Service` behind its routes, and the errors of routing in our shape.

Owns: putting together what the other files are. Nothing is read from the environment, nothing is
started here: a test makes as many apps as it likes.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import InvalidRequest, PdqError
from common.logs import get_logger
from gateway.errors import MethodNotAllowed, NotFound, error_response
from gateway.metrics import GatewayMetrics
from gateway.routes import ROUTES, build_router
from gateway.service import Service

log = get_logger("http")

_ROUTING_ERRORS: dict[int, type[InvalidRequest]] = {404: NotFound, 405: MethodNotAllowed}


def create_app(service: Service) -> FastAPI:
    """An ASGI app for `service`."""
    app = FastAPI(
        title="pdq",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # it would send the body to whatever place `Host` names
    )
    app.include_router(build_router(service))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    app.add_middleware(_CountResponses, metrics=service.metrics)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    kind = _ROUTING_ERRORS.get(error.status_code, InvalidRequest)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(kind(message), retry_after_s=1.0, more_headers=headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    log.error("http.internal_error", path=request.url.path, error=repr(error), exc_info=error)
    return error_response(PdqError("internal error"), retry_after_s=1.0)


class _CountResponses:
    """Counts each response once its status is known; paths that do not exist share one label."""

    _paths = frozenset(path for _, path, _ in ROUTES)

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._counter = metrics.responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counter.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
