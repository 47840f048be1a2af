"""What a process finds out before its bus can be reached: the key that all share, and its own address.

Owns: the key file, and the address that is advertised when the bus listens on every one. Whoever
starts first makes the key, the others read it; nobody but its user can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

from common.bus import new_secret_key
from common.config import BusSettings, RedisSettings
from common.errors import ConfigError, ServiceUnavailable

KEY_LENGTH = 40


def complete(bus: BusSettings, redis: RedisSettings) -> BusSettings:
    """The settings with key and address in them. Blocking: a file, a name that is looked up."""
    if bus.secret_key_file:
        key = _key(Path(bus.secret_key_file).expanduser())
        bus = dataclasses.replace(bus, secret_key=key, secret_key_file="")
    if not bus.advertise_host and _is_any(bus.host):
        bus = dataclasses.replace(bus, advertise_host=_address_towards(redis.url))
    return bus


def _key(path: Path) -> str:
    try:
        if not path.exists():
            _make_key(path)
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the bus secret key cannot be read from, or made in, {path}: {error}",
            param="secret_key_file",
        ) from error
    if len(key) != KEY_LENGTH:
        raise ConfigError(
            f"{path} holds no bus secret key: {KEY_LENGTH} characters are needed; remove the file, "
            "and a new key is made",
            param="secret_key_file",
        )
    return key


def _make_key(path: Path) -> None:
    """Whole or not at all, and never over one that another process has made meanwhile."""
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(new_secret_key() + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        unfinished.unlink()


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _address_towards(redis_url: str) -> str:
    """Our address on the way to Redis: whoever finds us there can come the same way."""
    place = urlsplit(redis_url)
    if not place.hostname:  # a unix socket: everybody is on this machine
        return "127.0.0.1"
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            place.hostname, place.port or 6379, type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # nothing is sent
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ServiceUnavailable(f"Redis cannot be reached: {place.hostname}: {error}") from error
    return f"[{own}]" if ":" in own else own
