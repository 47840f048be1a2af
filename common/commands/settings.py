"""Settings of the subcommands, read like those of the services (common/settings/config.py).

Owns: what `pdq serve` takes, which is nearly everything that gateway and nodes take, and how it is
divided between them. A setting that the gateway or the nodes gain is one of `pdq serve` without a
line here; where both have it (`--model`, `--redis-url`), both get it.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, TypeVar

from common.errors import ConfigError
from common.settings import loader as config_loader
from common.settings.config import (
    SERVICES,
    EngineSettings,
    GatewaySettings,
    LogSettings,
    NodeSettings,
    RedisSettings,
    holds_password,
)
from common.settings.loader import setting

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class NodesSettings:
    """Table of the nodes and gateways that Redis knows. The address of Redis is --redis-url,
    PDQ_REDIS_URL, or that of the `pdq serve` of this user which was started last."""

    json: bool = setting(False, "print JSON")
    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class QueueSettings:
    """Table of each node's queue; `pdq queue dead` and `pdq queue requeue ID` are about requests that
    made engines fail. The address of Redis is --redis-url, PDQ_REDIS_URL, or that of
    the `pdq serve` of this user which was started last."""

    json: bool = setting(False, "print JSON")
    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class DeadSettings:
    """Table of the dead letters, newest first: requests that made engines fail, also when they were
    alone."""

    json: bool = setting(False, "print JSON, with the token ids of their prompts")
    limit: int = setting(100, "how many at most", at_least=1)
    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class RequeueSettings:
    """Compute a dead letter once more, in steps of its own, under a new id; ID is that of the letter
    or of the request. A gateway takes it over; what becomes of it is shown, and in its record."""

    json: bool = setting(False, "print JSON")
    node: str = setting("", "the node that shall compute it, by name or incarnation (any)")
    wait_s: float = setting(60.0, "how long to wait for its end (0: not)", at_least=0)
    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class RequestsSettings:
    """Table of the latest requests, newest first. The address of Redis is --redis-url,
    PDQ_REDIS_URL, or that of the `pdq serve` of this user which was started last."""

    json: bool = setting(False, "print JSON")
    limit: int = setting(20, "requests to show", at_least=1)
    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class RedisShellSettings:
    """redis-cli with what follows as its arguments, such as `--scan --pattern 'pdq:*'`. The address
    of Redis is PDQ_REDIS_URL, or that of the `pdq serve` of this user which was started last; all
    settings come from the environment or the file, since flags are redis-cli's."""

    redis: RedisSettings = field(default_factory=RedisSettings)


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """Load for an OpenAI-compatible endpoint, as streamed completions, and what it took.

    With --rate, requests arrive when a Poisson process says so, whatever the server does, and
    every latency counts from that moment. With --concurrency, so many are always open."""

    url: str = setting("", "server (empty: this user's `pdq serve`, or http://127.0.0.1:8000)")
    api_key: str = setting("", "key to show", secret=True)
    served_model_name: str = setting("", "model to ask for (empty: the first that is served)")
    rate: float | None = setting(None, "arrivals per second, open loop (default 2)", at_least=1e-6)
    concurrency: int | None = setting(None, "open requests at any time, closed loop", at_least=1)
    requests: int = setting(100, "requests that count", at_least=1)
    warmup: int = setting(2, "requests before those that count", at_least=0)
    seed: int = setting(0, "of arrivals, lengths, prompts and sampling", at_least=0)
    prompt_len: int = setting(128, "tokens in a prompt", at_least=1)
    output_len: int = setting(64, "tokens to generate at most", at_least=1)
    trace: str = setting("", "CSV or JSONL file to draw pairs of lengths from")
    trace_scale: float = setting(1.0, "factor on the lengths of the trace", at_least=1e-6)
    dataset: Literal["random", "text"] = setting(
        "random", "prompts of random token ids (exact lengths), or of text (about that long)"
    )
    text_file: str = setting("", "where text is cut from (empty: random words)")
    vocab_size: int | None = setting(
        None, "random ids are below it (none: ids that the server's /tokenize gives)", at_least=1
    )
    shared_prefix: int = setting(0, "first tokens of every prompt that are the same", at_least=0)
    ignore_eos: bool = setting(False, "generate the full length")
    temperature: float = setting(0.0, "of sampling", at_least=0)
    ttft_slo: float | None = setting(None, "seconds to the first token, for goodput", at_least=0)
    tpot_slo: float | None = setting(None, "seconds per output token, for goodput", at_least=0)
    timeout: float = setting(600.0, "longest life of one request", at_least=0.001)
    json: str = setting("", "file for everything that was measured")
    plot: str = setting("", "PNG file for a picture of it (needs matplotlib)")
    redis: RedisSettings = field(default_factory=RedisSettings)

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError("use --rate or --concurrency, not both", param="rate")
        if holds_password(self.url):
            raise ConfigError("--url is a place only; PDQ_API_KEY is the key to show", param="url")


# ── pdq serve ────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What `pdq serve` starts: so many nodes of each role, and the settings all of them share."""

    prefill: int
    decode: int
    unified: int
    cores: tuple[int, ...]  # to be divided; never empty
    gateway: GatewaySettings
    node: NodeSettings


@dataclasses.dataclass(frozen=True)
class _ServeEngine(EngineSettings):
    cores: tuple[int, ...] = setting((), "cores to divide among the nodes (empty: all we may use)")


@dataclasses.dataclass(frozen=True)
class _ServeLog(LogSettings):
    level: Literal["debug", "info", "warning", "error"] = setting(
        "warning", "least level shown of what gateway and nodes log"
    )


_COUNTS: dict[str, Any] = {
    "prefill": setting(None, "prefill nodes (none: 1, or 0 beside unified ones)", at_least=0),
    "decode": setting(None, "decode nodes (none: 1, or 0 beside unified ones)", at_least=0),
    "unified": setting(0, "nodes that do both", at_least=0),
}
_OURS = ("name", "role")  # given to each process by `pdq serve` itself
_REPLACED = {"engine": _ServeEngine, "log": _ServeLog}


def _serve_settings() -> type[Any]:
    """One flat tree of our counts, the gateway's settings and the nodes'."""
    members: dict[str, tuple[str, Any, Any]] = {
        name: (name, int if name == "unified" else int | None, count) for name, count in _COUNTS.items()
    }
    of_engine = {f.name for f in dataclasses.fields(EngineSettings)}
    for service in (GatewaySettings, NodeSettings):
        hints = typing.get_type_hints(service)
        for f in dataclasses.fields(service):
            if f.name in _OURS or f.name in of_engine:
                continue
            kind = _REPLACED.get(f.name, hints[f.name])
            factory = f.default_factory
            if factory is not dataclasses.MISSING:
                copy: Any = field(default_factory=kind, metadata=f.metadata)
            else:
                copy = field(default=f.default, metadata=f.metadata)
            members[f.name] = (f.name, kind, copy)
    about = (
        "One gateway, nodes, and a Redis unless one is named: `pdq serve [MODEL] [settings]`.\n"
        "Ctrl-C stops all of it in order, a second one at once."
    )
    return dataclasses.make_dataclass(
        "ServeSettings", members.values(), frozen=True, namespace={"__doc__": about}
    )


ServeSettings = _serve_settings()

COMMANDS: list[type[Any]] = [
    ServeSettings,
    NodesSettings,
    QueueSettings,
    RequestsSettings,
    RedisShellSettings,
    BenchSettings,
]


def load(settings_class: type[T], argv: Sequence[str], environ: Mapping[str, str], program: str) -> T:
    """Settings of one subcommand; variables of the others and of the services are no mistake."""
    others = [*SERVICES, *COMMANDS]
    return config_loader.load(settings_class, argv, environ, program=program, others=others)


def load_deployment(argv: Sequence[str], environ: Mapping[str, str]) -> Deployment:
    """What `pdq serve` was asked for; `ConfigError` where it cannot be meant."""
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    given: Any = load(ServeSettings, argv, environ, "pdq serve")
    alone = 0 if given.unified else 1
    prefill = alone if given.prefill is None else given.prefill
    decode = alone if given.decode is None else given.decode
    if not given.unified and not (prefill and decode):
        raise ConfigError(
            f"{prefill} prefill and {decode} decode nodes cannot serve: at least one of each, or "
            "--unified, is needed",
            param="prefill",
        )
    if given.bus.port:
        raise ConfigError("--bus-port names one port, which several processes cannot share")
    if given.metrics.port and prefill + decode + given.unified > 1:
        raise ConfigError("--metrics-port names one port, which several nodes cannot share")
    node = NodeSettings(**_fields_of(NodeSettings, given))
    return Deployment(
        prefill,
        decode,
        given.unified,
        _usable(given.engine.cores),
        gateway=GatewaySettings(**_fields_of(GatewaySettings, given)),
        node=dataclasses.replace(node, gpu_nodes=max(node.gpu_nodes, prefill + decode + given.unified)),
    )


def _fields_of(service: type[Any], given: Any) -> dict[str, Any]:
    """The values that `service` has among the given ones, in their flat place or the engine's."""
    taken = {}
    for f in dataclasses.fields(service):
        if f.name not in _OURS:
            holder = given if hasattr(given, f.name) else given.engine
            taken[f.name] = getattr(holder, f.name)
    return taken


def _usable(wanted: tuple[int, ...]) -> tuple[int, ...]:
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(wanted) - allowed):
        raise ConfigError(
            f"--cores: core {missing[0]} is not ours; we may use " + ",".join(map(str, sorted(allowed))),
            param="cores",
        )
    return tuple(sorted(set(wanted) or allowed))
