"""Which path is which endpoint, and the small endpoints themselves.

Owns: `/v1/models`, `/tokenize`, `/detokenize`, `/health`, `/ready`, `/metrics`, and the seam where
an error of ours becomes a response (gateway/errors.py). The two big endpoints have their own files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from common.errors import PdqError
from common.metrics import CONTENT_TYPE_LATEST
from gateway.chat import chat_completions
from gateway.completions import completions
from gateway.errors import error_response
from gateway.served_models import ServedModel
from gateway.service import Service
from gateway.sse import JSONAnswer
from gateway.unknown_fields import Warned

Endpoint = Callable[[Service, Request], Awaitable[Response]]


async def models(service: Service, request: Request) -> Response:
    service.access.check_key(request)
    return JSONResponse({"object": "list", "data": [_model(service, m) for m in service.models]})


async def model(service: Service, request: Request) -> Response:
    service.access.check_key(request)
    return JSONResponse(_model(service, service.models.find(request.path_params["name"])))


async def tokenize(service: Service, request: Request) -> Response:
    return await _answered("tokenize", service, request)


async def detokenize(service: Service, request: Request) -> Response:
    return await _answered("detokenize", service, request)


async def _answered(kind: str, service: Service, request: Request) -> Response:
    prepared = await service.prepared(kind, request)

    async def parts() -> Sequence[bytes]:
        return (prepared.answer,)

    return JSONAnswer(parts, service.limits.retry_after_s)


async def health(service: Service, request: Request) -> Response:
    """The process answers. Whether requests can be served is `/ready`."""
    return JSONResponse({"status": "ok"})


async def ready(service: Service, request: Request) -> Response:
    missing = "draining" if service.draining else service.ready()
    if missing is not None:
        return JSONResponse({"status": "not ready", "reason": missing}, 503)
    return JSONResponse({"status": "ready"})


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model(service: Service, model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.models.created,
        "owned_by": "pdq",
        "max_model_len": service.context_length(model),
    }


ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
)


def build_router(service: Service) -> APIRouter:
    router = APIRouter()
    for method, path, endpoint in ROUTES:
        router.add_route(path, _bound(service, endpoint), methods=[method])
    return router


def _bound(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        request.state.ignored_fields = ()
        try:
            service.access.check_host(request)
            response = await endpoint(service, request)
        except PdqError as error:
            response = error_response(error, service.limits.retry_after_s)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's name for it in the metrics
        ignored = request.state.ignored_fields
        return Warned(response, ignored) if ignored else response

    return handle
