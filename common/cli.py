"""`pdq`: one command, its subcommands, and how their errors reach a person.

Owns: the list of subcommands, and the form of an error: one line to stderr and an exit code of 1,
or of 2 where the command itself is unknown. Each subcommand is imported when it is called.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from common.errors import PdqError
from common.version import version

COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("common.commands.serve", "main", "start gateway, nodes and Redis on this machine"),
    "nodes": ("common.commands.inspect", "nodes", "the nodes and gateways there are"),
    "queue": ("common.commands.inspect", "queue", "what waits and what is at work, by node"),
    "requests": ("common.commands.inspect", "requests", "the latest requests and their stages"),
    "redis": ("common.commands.redis_shell", "main", "redis-cli, at the Redis of the running system"),
    "distill": (
        "common.commands.distill",
        "main",
        "make a draft model for speculation, from a model's own text",
    ),
    "bench": ("common.commands.bench.command", "main", "put load on a server and measure it"),
}
"""Name → module, function taking the arguments after the name, one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; never raises what a person could have caused."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        print(help_text())
        return 0 if arguments else 2
    if name in ("--version", "-V"):
        print(f"pdq {version()}")
        return 0
    if name not in COMMANDS:
        print(f"pdq: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]
    try:
        code: int = getattr(importlib.import_module(module), function)(arguments[1:])
        sys.stdout.flush()
        return code
    except PdqError as error:
        print(f"pdq {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pdq {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `pdq requests | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def help_text() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {about}" for name, (_, _, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pdq COMMAND [settings]",
            "",
            "Prefill and Decode over a Queue: serves large language models.",
            "",
            "commands:",
            *rows,
            "",
            "`pdq COMMAND --help` shows a command's settings; `pdq --version` the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
