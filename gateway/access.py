"""Checks that come before a body is read: who may ask, under which name of this server, in which form.

Owns: API keys, the names under which this server may be called, and the type of a body. Loopback does not
keep out a web page that somebody opens in a browser on this machine:

    it posts a form or plain text       refused: only JSON is taken, which a page of another
                                        origin may not send unless we allow it, and we never do
    its own name resolves to us         refused: on loopback and without keys, `Host` and `Origin`
    (DNS rebinding)                     must name this machine or an allowed host
"""

from __future__ import annotations

import hmac
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request

from common.api_keys import read_keys
from common.settings.config import GatewaySettings, is_loopback
from gateway.errors import HostNotAllowed, InvalidKey, UnsupportedMediaType


class Access:
    """With `keys`, clients must show one of them. With `hosts`, a request must name one of these, or this
    machine itself; None allows any name."""

    def __init__(self, keys: tuple[str, ...] = (), hosts: frozenset[str] | None = None) -> None:
        self._keys = tuple(key.encode() for key in keys)
        self._hosts = hosts

    @classmethod
    def of(cls, settings: GatewaySettings) -> Access:
        """Make it as the settings say. Reads the file of keys."""
        keys = settings.api_keys
        if settings.api_key_file:
            keys += read_keys(Path(settings.api_key_file).expanduser())
        if keys or not settings.is_private:
            return cls(keys)
        names = (settings.host, settings.published_host, *settings.allowed_hosts)
        return cls(hosts=frozenset(name.lower() for name in names if name))

    def check_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, key = _credentials(request)
        # Every key is compared, in constant time each.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if scheme != "bearer" or not any(matches):
            raise InvalidKey("an API key is needed: Authorization: Bearer KEY")

    def client(self, request: Request) -> str:
        """What identifies a client when resources are shared out: its key, or its address where there are no
        keys."""
        if self._keys:
            return _credentials(request)[1].decode("latin-1")
        return request.client.host if request.client else ""

    def check_host(self, request: Request) -> None:
        """Refuse a request for another host name, or from a page of another one."""
        if self._hosts is None:
            return
        host, origin = request.headers.get("host"), request.headers.get("origin")
        for header, named in (("Host", host and f"//{host}"), ("Origin", origin)):
            if named and not self._knows(named):
                raise HostNotAllowed(
                    f"{header} is not a name of this server; --allowed-hosts adds one, and with "
                    "API keys any will do",
                    param=header,
                )

    def _knows(self, place: str) -> bool:
        assert self._hosts is not None
        try:
            name = (urlsplit(place).hostname or "").removesuffix(".")
        except ValueError:
            return False
        return is_loopback(name) or name in self._hosts

    @staticmethod
    def check_json(request: Request) -> None:
        """Refuse a body that does not say that it is JSON (`application/json`, or a type that ends in
        +json), or that is compressed."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise UnsupportedMediaType(
                "a body is taken as it is, without Content-Encoding", param="Content-Encoding"
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise UnsupportedMediaType(
                "a JSON body is needed: Content-Type: application/json", param="Content-Type"
            )


def _credentials(request: Request) -> tuple[str, bytes]:
    """The scheme of `Authorization` in lower case, and the bytes that follow it."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return scheme.lower(), key.strip().encode("latin-1")
