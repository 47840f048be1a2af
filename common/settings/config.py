"""Settings: one frozen dataclass tree per service, built once at its start and passed down.

Owns: every setting's name, type, default and help line. Knows nothing of what the settings do, nor
of how they are read (loader.py). A new setting is one line: a field with
`setting(default, "help")`; a new service is one class, and one entry in `SERVICES`. The flags of a
nested tree start with its field's name, or with the `prefix` in the field's metadata.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from common.api_keys import check_keys
from common.errors import ConfigError
from common.settings import loader as config_loader
from common.settings.loader import child_environment, describe, setting
from common.settings.values import DEVICE_FORM, parse_bytes, parse_device

__all__ = ["child_environment", "describe", "is_loopback", "load"]

T = TypeVar("T")


def holds_password(url: str) -> bool:
    """Whether an address names more than a place. What is in doubt does: a password with a slash in
    it ends the part where a user and password stand."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    return "@" in (parts.netloc if parts.scheme == "unix" else url) or "password" in parse_qs(
        parts.query, keep_blank_values=True
    )


@dataclasses.dataclass(frozen=True)
class RedisSettings:
    """How to reach Redis, and for how long to try."""

    url: str = setting(
        "",
        "redis://, rediss:// or unix:// address of Redis or Valkey; one with a password only in "
        "the environment or a file",
        secret=holds_password,
    )
    prefix: str = setting("pdq", "first part of every key")
    timeout_s: float = setting(5.0, "longest wait for one answer", at_least=0.01)
    retry_s: float = setting(2.0, "how long a repeatable operation is retried", at_least=0)
    max_connections: int = setting(32, "connections at most; who finds none free waits for one", at_least=4)


@dataclasses.dataclass(frozen=True)
class BusSettings:
    """Messages between nodes and gateways, and when a silent peer counts as dead."""

    host: str = setting("127.0.0.1", "address to listen on; beyond loopback a secret key is needed")
    port: int = setting(0, "port to listen on (0: any free one)", at_least=0)
    advertise_host: str = setting(
        "", "address that peers connect to (empty: host, or where that is any, how Redis sees us)"
    )
    beat_interval_s: float = setting(0.5, "time between two beats", at_least=0.01)
    missed_beats: int = setting(6, "beats that may be missing before a peer is dead", at_least=2)
    stall_limit_s: float = setting(60.0, "a busy peer without a step for so long is dead")
    high_water_mark: int = setting(10_000, "messages waiting for one peer at most", at_least=1)
    max_message_bytes: int = setting(2**26, "largest message frame", parse=parse_bytes, at_least=1)
    secret_key: str = setting("", "Z85 CURVE key (40 characters) of the whole system", secret=True)
    secret_key_file: str = setting(
        "",
        "file with that key, made with a new one where it is missing (empty: bus.key in "
        "~/.local/state/pdq, for what one user runs on one machine)",
    )

    def __post_init__(self) -> None:
        if self.secret_key and len(self.secret_key) != 40:
            raise ConfigError("the bus secret key must have 40 characters", param="secret_key")
        if self.secret_key and self.secret_key_file:
            raise ConfigError(
                "bus secret_key and secret_key_file both give the key; use one", param="secret_key_file"
            )
        if not (self.secret_key or self.secret_key_file) and not is_loopback(self.host):
            raise ConfigError(
                f"without a bus secret key of its own only loopback can be listened on, not "
                f"{self.host!r}; name a file for one with --bus-secret-key-file",
                param="host",
            )


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The model and the engine that runs it; names as vLLM's where the meaning is the same."""

    model: str = setting("", "folder or hub name of the model (empty: the one that ships)")
    revision: str = setting("", "branch, tag or commit of a model from the hub")
    served_model_name: str = setting("", "name that clients use (empty: the model's own)")
    hf_overrides: str = setting("", "JSON object of fields in place of those of config.json")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting("auto", "type of weights")
    load_format: Literal["auto", "dummy"] = setting("auto", "dummy: random weights, to measure cost")
    seed: int = setting(0, "seed of dummy weights", at_least=0)
    kernels: Literal["auto", "reference"] = setting("auto", "reference: plain torch, to compare")
    attention: Literal["auto", "flashinfer", "flash-attn"] = setting(
        "auto",
        "auto: our own kernels; a library by its name, on a GPU: a request that is made again may then give "
        "other tokens",
    )
    device: str = setting(
        "auto",
        "where the model runs; cuda: any GPU that is free, cuda:N: that one of those this process sees",
        parse=parse_device,
        form=DEVICE_FORM,
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "share of all memory of a GPU that this process takes, for weights, KV pool and all else",
        above=0,
        at_most=1,
    )
    share_gpu: bool = setting(
        False,
        "other nodes may have the same GPU, if they say so too: give each its gpu_memory_utilization, "
        "together at most 1",
    )
    enforce_eager: bool = setting(False, "record no CUDA graphs: start sooner, decode more slowly")
    tensor_parallel_size: int = setting(1, "GPUs that one model is divided among; reserved: 1", at_least=1)
    max_model_len: int | None = setting(None, "longest prompt plus output, in tokens", at_least=2)
    block_size: int = setting(16, "token positions in one KV block", at_least=1)
    num_kv_blocks: int | None = setting(None, "blocks in the KV pool, exactly", at_least=1)
    kv_cache_memory_bytes: int | None = setting(
        None, "size of the KV pool, such as 2GiB", parse=parse_bytes, at_least=1
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = setting(
        "auto", "type of keys and values in the KV pool (auto: that of the weights; fp8: fp8_e4m3)"
    )
    max_num_seqs: int | None = setting(
        None, "sequences in one step at most (none: 64, on a GPU 256)", at_least=1
    )
    max_num_batched_tokens: int | None = setting(
        None, "tokens in one step at most (none: 512, on a GPU 2048, or 8192 if it has 70 GiB)", at_least=1
    )
    target_itl_s: float = setting(
        0.5,
        "longest step while sequences decode: prompts are cut to what the measured cost of steps allows "
        "(0: only by max_num_batched_tokens)",
        at_least=0,
    )
    async_scheduling: bool | None = setting(
        None, "plan a step while the one before is computed (none: unless the CPU computes it)"
    )
    speculative: Literal["off", "ngram", "draft", "ngram+draft"] = setting(
        "off", "what drafts tokens that the model verifies, several in a step; the output is the same"
    )
    speculative_model: str = setting(
        "", "folder or hub name of the draft model (empty: the one that ships, for the model that ships)"
    )
    speculative_by_text: bool = setting(
        False, "the draft model may have another tokenizer: its drafts are encoded anew"
    )
    num_speculative_tokens: int | None = setting(
        None, "tokens drafted for a sequence in a step at most (none: 8)", at_least=1, at_most=64
    )
    enable_prefix_caching: bool = setting(True, "reuse the blocks of equal prefixes")
    kv_digests: bool = setting(True, "check every block that is handed over against its digest")
    threads: int | None = setting(None, "compute threads (none: one per core of ours)", at_least=1)
    cores: tuple[int, ...] = setting((), "cores this process is bound to (empty: not bound)")

    def __post_init__(self) -> None:
        if self.num_kv_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "num_kv_blocks and kv_cache_memory_bytes both give the pool's size; use one",
                param="num_kv_blocks",
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size is reserved: a model runs on one GPU so far, not on "
                f"{self.tensor_parallel_size}; several nodes use several GPUs",
                param="tensor_parallel_size",
            )
        drafts = self.uses_draft_model
        if self.speculative_by_text and not drafts:
            raise ConfigError(
                f"speculative_by_text is for speculative draft and ngram+draft, not {self.speculative}",
                param="speculative_by_text",
            )
        if self.speculative_model and not drafts:
            raise ConfigError(
                f"speculative_model is for speculative draft and ngram+draft, not {self.speculative}",
                param="speculative_model",
            )
        if drafts and self.model and not self.speculative_model:
            raise ConfigError(
                f"speculative {self.speculative} needs the speculative_model that drafts for {self.model}",
                param="speculative_model",
            )
        if self.speculative == "off":
            if self.num_speculative_tokens is not None:
                raise ConfigError(
                    "num_speculative_tokens says how many tokens are drafted, but speculative is off",
                    param="num_speculative_tokens",
                )
        elif self.max_num_batched_tokens is not None and self.most_drafted >= self.max_num_batched_tokens:
            raise ConfigError(
                f"num_speculative_tokens ({self.most_drafted}) and the token that follows them do not fit "
                f"into a step of max_num_batched_tokens ({self.max_num_batched_tokens})",
                param="num_speculative_tokens",
            )

    @property
    def uses_draft_model(self) -> bool:
        return "draft" in self.speculative.split("+")

    @property
    def most_drafted(self) -> int:
        """Tokens drafted for a sequence in a step."""
        return 8 if self.num_speculative_tokens is None else self.num_speculative_tokens


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What goes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", "least level shown")


@dataclasses.dataclass(frozen=True)
class MetricsSettings:
    """Where a node serves `/metrics`, for Prometheus. There is nothing of a prompt in it, and no key."""

    host: str = setting("127.0.0.1", "address to serve /metrics on")
    port: int | None = setting(0, "port of /metrics (0: any free one; none: off)", at_least=0)


@dataclasses.dataclass(frozen=True)
class NodeSettings:
    """One node: its role, its engine, and how others reach it."""

    role: Literal["prefill", "decode", "unified"] = setting("unified", "what this node does")
    name: str = setting("", "name of the node, the same over its lives (empty: role and host)")
    grace_period_s: float = setting(30.0, "time that a drain gives to what runs", at_least=0)
    transports: tuple[Literal["cuda_ipc", "shm", "nixl", "nccl", "tcp"], ...] = setting(
        ("cuda_ipc", "shm", "tcp"),
        "ways to hand blocks over, preferred first (those that the pool's memory can have)",
    )
    encrypt_blocks: bool | None = setting(
        None,
        "encrypt what tcp carries; blocks are several times faster in plain text, for a "
        "network that is trusted (none: between hosts, not on loopback)",
    )
    gpu_nodes: int = setting(
        1,
        "nodes that divide the GPUs that --device allows (`pdq serve` counts its own): where there are "
        "fewer GPUs they share them, each with its part of gpu_memory_utilization",
        at_least=1,
    )
    shm_dir: str = setting(
        "", "folder that containers of one host share, for the sockets that hand out shared memory"
    )
    engine: EngineSettings = field(default_factory=EngineSettings, metadata={"prefix": ""})
    redis: RedisSettings = field(default_factory=RedisSettings)
    bus: BusSettings = field(default_factory=BusSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    log: LogSettings = field(default_factory=LogSettings)


@dataclasses.dataclass(frozen=True)
class HTTPSettings:
    """What a gateway's HTTP connections may take, and for how long."""

    max_connections: int = setting(
        1024, "connections at most; beyond, the one that waits longest for its request makes way", at_least=1
    )
    header_timeout_s: float = setting(10.0, "time for a request's head to arrive", at_least=0.01)
    body_timeout_s: float = setting(60.0, "time for a request's body to arrive", at_least=0.01)
    keep_alive_timeout_s: float = setting(5.0, "time an idle connection is kept", at_least=0.01)
    write_timeout_s: float = setting(
        30.0, "a client that takes nothing of its answer for so long is cut off", at_least=0.01
    )


@dataclasses.dataclass(frozen=True)
class GatewaySettings:
    """One gateway: the HTTP side, and what one client may ask for."""

    host: str = setting("127.0.0.1", "HTTP address to listen on; beyond loopback API keys are needed")
    port: int = setting(8000, "HTTP port", at_least=0)
    name: str = setting("", "name of the gateway, the same over its lives (empty: from the host)")
    model: str = setting("", "folder or hub name of the model (empty: the one that ships)")
    revision: str = setting("", "branch, tag or commit of a model from the hub")
    served_model_name: str = setting("", "name that clients use (empty: the model's own)")
    load_format: Literal["auto", "dummy"] = setting(
        "auto", "dummy: nodes have random weights in place of the model's"
    )
    hf_overrides: str = setting(
        "", "JSON object of fields in place of those of config.json (not of further models)"
    )
    models: tuple[str, ...] = setting(
        (),
        "further models to answer for, each a folder, a hub name, NAME=one of these, or a JSON "
        "object with model and, each as it likes, name, revision and hf_overrides",
    )
    api_keys: tuple[str, ...] = setting(
        (), "keys that clients must show, with commas (none: open)", secret=True, aliases=("api-key",)
    )
    api_key_file: str = setting("", "file with such keys, one a line; # begins a comment")
    published_host: str = setting(
        "", "address at which the host of a container publishes the port (empty: as --host)"
    )
    allow_unauthenticated: bool = setting(
        False, "listen beyond loopback without API keys: whoever reaches the port may use the model"
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "names beside localhost that requests may call this server by, where it is on loopback "
        "and without API keys: a web page must not reach it under a name of its own",
    )
    generation_config: Literal["auto", "none"] = setting(
        "auto", "none: requests that say nothing do not get the model's own temperature and the like"
    )
    max_body_bytes: int = setting(2**22, "largest request body", parse=parse_bytes, at_least=1)
    max_bodies_bytes: int = setting(
        2**26,
        "all bodies that are read at one time; one client may hold half of it",
        parse=parse_bytes,
        at_least=1,
    )
    max_prompt_tokens: int | None = setting(None, "longest prompt (none: the model's)", at_least=1)
    max_n: int = setting(16, "most choices of one request", at_least=1)
    max_prompts: int = setting(64, "most prompts in one request", at_least=1)
    unknown_fields: Literal["warn", "refuse"] = setting(
        "warn", "what happens to fields of a body that nobody knows"
    )
    max_open_requests: int = setting(256, "open requests at most; further ones get 429", at_least=1)
    intake_processes: int = setting(
        2, "processes that read large bodies; one more takes the small chats", at_least=1
    )
    max_attempts: int = setting(4, "times that one request is tried", at_least=1)
    placement_timeout_s: float = setting(
        8.0, "how long a request waits for a node that can take it", at_least=0.01
    )
    decode_prompt_tokens: int = setting(
        512, "prompt tokens that an idle decode node computes itself at most (0: none)", at_least=0
    )
    request_timeout_s: float = setting(600.0, "longest life of a request", at_least=0.1)
    grace_period_s: float = setting(30.0, "time that a drain gives to open requests", at_least=0)
    http: HTTPSettings = field(default_factory=HTTPSettings, metadata={"prefix": ""})
    redis: RedisSettings = field(default_factory=RedisSettings)
    bus: BusSettings = field(default_factory=BusSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        check_keys(self.api_keys, "PDQ_API_KEYS")
        if not (self.is_private or self.is_guarded or self.allow_unauthenticated):
            raise ConfigError(
                f"without API keys only loopback can be listened on, not {self.public_host!r}: put "
                "keys into PDQ_API_KEYS, or name a file of them with --api-key-file; "
                "--allow-unauthenticated opens it to everybody",
                param="host",
            )

    @property
    def public_host(self) -> str:
        """The address at which the world finds it."""
        return self.published_host or self.host

    @property
    def is_private(self) -> bool:
        """Whether it can be reached from this machine only."""
        return is_loopback(self.public_host)

    @property
    def is_guarded(self) -> bool:
        """Whether clients must show a key."""
        return bool(self.api_keys or self.api_key_file)


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """`pdq distill TARGET` makes a draft model for speculative decoding, which learns from text that the
    target writes. Ctrl-C ends the training, and what was learned is kept; a second one leaves nothing."""

    model: str = setting(
        "", "folder or hub name of the target, also without the flag (empty: the one that ships)"
    )
    revision: str = setting("", "branch, tag or commit of a model from the hub")
    output: str = setting("", "folder to make (empty: the target's name and -draft, here)")
    prompts: str = setting(
        "",
        "file of what texts begin with: a prompt in each line, or in a .jsonl file an object with `prompt` "
        "or `text`, a string or token ids (empty: the target writes beginnings, too)",
    )
    layers: int | None = setting(None, "layers of the draft (none: 2)", at_least=1, at_most=1024)
    hidden_size: int | None = setting(
        None, "width of the draft, a multiple of 32 (none: 3/8 of the target's)", at_least=32, at_most=2**16
    )
    texts: int = setting(2048, "texts that the target writes", at_least=16, at_most=2**24)
    text_length: int = setting(256, "tokens of a text, its prompt included", at_least=8, at_most=2**16)
    temperatures: tuple[float, ...] = setting((0.0, 0.6, 0.8, 1.0), "at which they are written")
    steps: int = setting(1000, "of training", at_least=1)
    minutes: float | None = setting(
        None,
        "of training at most; the result then depends on the machine's speed (none: no limit)",
        at_least=0.01,
    )
    batch_tokens: int = setting(6144, "tokens of a step of training", at_least=1, at_most=2**24)
    seed: int = setting(
        0, "of everything random: the same one gives the same draft", at_least=0, at_most=2**31 - 1
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting("auto", "type of the target's weights")
    device: str = setting("auto", "where both models run", parse=parse_device, form=DEVICE_FORM)
    threads: int | None = setting(None, "compute threads (none: one per core of ours)", at_least=1)

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            if not 0.0 <= temperature <= 100.0:
                raise ConfigError(
                    f"temperatures must be between 0 and 100, not {temperature}", param="temperatures"
                )
        if not self.temperatures:
            raise ConfigError("temperatures must name at least one", param="temperatures")


SERVICES: list[type[Any]] = [NodeSettings, GatewaySettings, DistillSettings]
"""All trees; a `PDQ_…` variable of any of them is no mistake in the environment of another."""


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def load(
    settings_class: type[T], argv: Sequence[str], environ: Mapping[str, str], *, program: str = "pdq"
) -> T:
    """`config_loader.load` with all services' variables allowed in the environment."""
    return config_loader.load(settings_class, argv, environ, program=program, others=SERVICES)
