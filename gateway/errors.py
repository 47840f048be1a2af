"""From the exception tree of common/errors.py to HTTP: status, headers, and OpenAI's error body.

Owns: which error is which status, and the body `{"error": {message, type, param, code}}`. Also the
few errors that exist only because there is HTTP: unknown model, body too large, bad key, and what
is wrong with a request before it reaches an endpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

from common.errors import (
    InvalidRequest,
    Overloaded,
    PdqError,
    RequestAborted,
    ResourceError,
    ServiceUnavailable,
)


class UnknownModel(InvalidRequest):
    code = "model_not_found"


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"


class InvalidKey(InvalidRequest):
    code = "invalid_api_key"


class NotFound(InvalidRequest):
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"


class MalformedHTTP(InvalidRequest):
    code = "malformed_http"


class RequestTimeout(InvalidRequest):
    code = "request_timeout"


class URITooLong(InvalidRequest):
    code = "uri_too_long"


class HeadTooLarge(InvalidRequest):
    code = "head_too_large"


class NotImplementedHere(InvalidRequest):
    code = "not_implemented"


class HostNotAllowed(InvalidRequest):
    code = "host_not_allowed"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


# First match wins, so the narrower type stands before the wider one.
STATUS: tuple[tuple[type[PdqError], int, str], ...] = (
    (UnknownModel, 404, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (InvalidKey, 401, "authentication_error"),
    (NotFound, 404, "invalid_request_error"),
    (MethodNotAllowed, 405, "invalid_request_error"),
    (RequestTimeout, 408, "invalid_request_error"),
    (URITooLong, 414, "invalid_request_error"),
    (HeadTooLarge, 431, "invalid_request_error"),
    (NotImplementedHere, 501, "invalid_request_error"),
    (HostNotAllowed, 403, "invalid_request_error"),
    (UnsupportedMediaType, 415, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (Overloaded, 429, "overloaded_error"),
    (RequestAborted, 504, "server_error"),
    (ServiceUnavailable, 503, "server_error"),
    (ResourceError, 503, "server_error"),
    (PdqError, 500, "server_error"),
)


def status_of(error: PdqError) -> int:
    return next(status for kind, status, _ in STATUS if isinstance(error, kind))


def error_body(error: PdqError) -> dict[str, object]:
    """OpenAI's error object; the same in a response and as the last event of a stream."""
    label = next(label for kind, _, label in STATUS if isinstance(error, kind))
    return {"error": {"message": error.message, "type": label, "param": error.param, "code": error.code}}


def error_named(code: str, message: str, param: str | None) -> PdqError:
    """The error with this code, whichever module has it; `PdqError` for a code nobody has."""
    return _kinds(PdqError).get(code, PdqError)(message, param=param)


def _kinds(parent: type[PdqError]) -> dict[str, type[PdqError]]:
    found = {parent.code: parent}
    for kind in parent.__subclasses__():
        found.update(_kinds(kind))
    return found


def error_json(error: PdqError) -> bytes:
    return json.dumps(error_body(error)).encode()


def error_response(
    error: PdqError, retry_after_s: float, more_headers: Mapping[str, str] | None = None
) -> Response:
    status = status_of(error)
    headers = dict(more_headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_json(error), status, headers, "application/json")
