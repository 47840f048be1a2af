"""What a process finds out before its bus can be reached: the key that all share, and its own address.

Owns: the key file, and the address that is advertised when the bus listens on every one. Whoever
starts first makes the key, the others read it; nobody but its user can. Where no file is named it is
`bus.key` in `$XDG_STATE_HOME/pdq` or `~/.local/state/pdq`: what one user starts on one machine finds
each other, and nobody else does.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from common.errors import ConfigError, ServiceUnavailable
from common.secret_files import read_secret, require_own_folder, write_secret
from common.settings.config import BusSettings, GatewaySettings, NodeSettings, RedisSettings
from common.wire.bus import new_secret_key

KEY_LENGTH = 40

T = TypeVar("T", NodeSettings, GatewaySettings)


def with_bus(settings: T, environ: Mapping[str, str]) -> T:
    """The settings of a service whose bus is complete."""
    bus = complete(settings.bus, settings.redis, environ)
    return dataclasses.replace(settings, bus=bus)


def complete(bus: BusSettings, redis: RedisSettings, environ: Mapping[str, str]) -> BusSettings:
    """The settings with key and address in them. Blocking: a file, a name that is looked up."""
    if not bus.secret_key:
        file = bus.secret_key_file
        path = Path(file).expanduser() if file else _own_place(environ)
        bus = dataclasses.replace(bus, secret_key=_key(path), secret_key_file="")
    if not bus.advertise_host and _is_any(bus.host):
        bus = dataclasses.replace(bus, advertise_host=_address_towards(redis.url))
    return bus


def make_key(path: Path) -> None:
    """Write a new key, unless another process has made one meanwhile; `OSError` where that fails."""
    write_secret(path, new_secret_key() + "\n", replace=False)


def _own_place(environ: Mapping[str, str]) -> Path:
    """Where this user's key is kept: in a folder that nobody else can write to."""
    try:
        state = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home(), ".local", "state")
        folder = Path(state, "pdq")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own_folder(folder, "the bus secret key")
    except (OSError, RuntimeError) as error:  # read-only, or a user without a home
        raise ConfigError(
            f"there is no place for the bus secret key: {error}; name a file for it with "
            "--bus-secret-key-file",
            param="secret_key_file",
        ) from error
    return folder / "bus.key"


def _key(path: Path) -> str:
    try:
        if not path.exists():
            make_key(path)
    except OSError as error:
        raise ConfigError(
            f"the bus secret key cannot be made in {path}: {error}", param="secret_key_file"
        ) from error
    key = read_secret(path, "the bus secret key").strip()
    if len(key) != KEY_LENGTH:
        raise ConfigError(
            f"{path} holds no bus secret key: {KEY_LENGTH} characters are needed; remove the file, "
            "and a new key is made",
            param="secret_key_file",
        )
    return key


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _address_towards(redis_url: str) -> str:
    """Our address on the way to Redis: whoever finds us there can come the same way."""
    try:
        place = urlsplit(redis_url)
        host, port = place.hostname, place.port or 6379
    except ValueError:  # whose text would show a part of a password
        raise ConfigError("not an address of Redis", param="redis.url") from None
    if not host:  # a unix socket: everybody is on this machine
        return "127.0.0.1"
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # nothing is sent
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ServiceUnavailable(f"Redis cannot be reached: {host}: {error}") from error
    return f"[{own}]" if ":" in own else own
