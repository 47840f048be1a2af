"""`pdq redis`: redis-cli at the Redis of the running system, with its address and password.

Owns: how that command is called. The password goes in by its environment, never on its command line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from common.commands import running
from common.commands.settings import RedisShellSettings, load
from common.errors import ConfigError, ResourceError

PROGRAMS = ("redis-cli", "valkey-cli")


def main(argv: Sequence[str]) -> int:
    """Becomes redis-cli: returns never."""
    help_only = [argument for argument in argv if argument == "--help"][:1]
    settings = load(RedisShellSettings, help_only, os.environ, "pdq redis")
    url = running.redis_of(settings.redis, os.environ).url
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise ResourceError(f"there is no {' or '.join(PROGRAMS)} on the PATH")
    place, password = command_line(url)
    environment = {**os.environ, **dict.fromkeys(("REDISCLI_AUTH", "VALKEYCLI_AUTH"), password)}
    os.execve(program, [program, *place, *argv], environment if password else os.environ)


def command_line(url: str) -> tuple[list[str], str]:
    """Arguments that lead redis-cli to this address, and the password that it asks for there."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        raise ConfigError("not an address of Redis", param="redis.url") from None
    if parts.scheme == "unix":
        place = ["-s", unquote(parts.path)]
    else:
        place = ["-h", parts.hostname or "localhost", "-p", str(port)]
        place += ["-n", parts.path[1:]] if parts.path[1:].isdecimal() else []
        place += ["--tls"] if parts.scheme == "rediss" else []
    if parts.username:
        place += ["--user", unquote(parts.username)]
    return place, unquote(parts.password or "")
