"""The models that this gateway answers for, each with its tokenizer, and which one a client means.

Owns: loading them at start from what the settings name, and `model` in bodies and paths. A model is
served wherever nodes run it; a node of a model that nobody serves is left alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ContextLengthExceeded
from common.identity import ModelIdentity
from common.logs import get_logger
from common.model_files import model_name, model_revision, resolve_model
from common.model_folder.description import describe_model, parse_overrides, read_config
from common.model_folder.generation import SamplingDefaults
from common.settings.config import GatewaySettings
from gateway.errors import UnknownModel
from gateway.tokenizer import Tokenizer

log = get_logger("gateway")


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: the identity that its nodes must have, and its tokenizer."""

    identity: ModelIdentity
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.model.vocab_size

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self.tokenizer.model.sampling_defaults

    @property
    def max_model_len(self) -> int | None:
        """Positions of its context; None where its folder does not say."""
        return self.tokenizer.model.context_length

    def longest_prompt(self, limit: int | None) -> int | None:
        """Tokens that a prompt may have, `limit` being the gateway's own; None where nobody says."""
        context = self.max_model_len
        limits = (limit, context and context - 1)
        return min((limit for limit in limits if limit is not None), default=None)

    def check_length(self, count: int, limit: int | None, param: str, *, at_least: bool = False) -> None:
        """Raises `ContextLengthExceeded` for a prompt of `count` tokens, or `at_least` so many."""
        longest = self.longest_prompt(limit)
        if longest is not None and count > longest:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_model_len or longest} tokens. "
                f"However, your {param} has {'at least ' if at_least else ''}{count} tokens, and "
                f"{longest} are allowed. Please reduce the length of the {param}.",
                param=param,
            )


class ServedModels:
    """All models by name, at least one. The first answers whoever names none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        self.created = int(time.time())
        if len(self._models) < len(models):
            twice = next(m.name for m in models if m is not self._models[m.name])
            raise ConfigError(
                f"two models have the name {twice!r}; write NAME=MODEL to name one", param="models"
            )

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def default(self) -> ServedModel:
        return next(iter(self))

    def find(self, name: str | None) -> ServedModel:
        """The model with this name; raises `UnknownModel`."""
        if name is None:
            return self.default
        if name not in self._models:
            served = ", ".join(map(repr, self._models))
            raise UnknownModel(
                f"the model {name!r:.200} is not served here; {served:.2000} "
                f"{'is' if len(self._models) == 1 else 'are'}",
                param="model",
            )
        return self._models[name]


def load_models(settings: GatewaySettings) -> ServedModels:
    """Every model that the settings name. Blocking: reads folders, downloads what is not here."""
    first = Source(
        settings.model, settings.served_model_name, settings.revision, parse_overrides(settings.hf_overrides)
    )
    further = map(parse_source, settings.models)
    return ServedModels([_load(settings, source) for source in (first, *further)])


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are, and what is made of them: what a node of it is started with."""

    model: str
    name: str = ""
    revision: str = ""
    hf_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_source(entry: str) -> Source:
    """One of `--models`: MODEL, NAME=MODEL, or a JSON object. Raises `ConfigError`."""
    if entry.startswith("{"):
        return _source_in(entry)
    name, separator, model = entry.partition("=")
    if not separator:
        return Source(entry)
    if not (name and model):
        raise ConfigError(f"{entry!r} is not NAME=MODEL", param="models")
    return Source(model, name)


def _source_in(entry: str) -> Source:
    try:
        fields = json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"models: {entry!r:.200} is not JSON: {error}", param="models") from error
    kinds = {"model": str, "name": str, "revision": str, "hf_overrides": dict}
    for field, value in fields.items():
        if not isinstance(value, kinds.get(field, ())):
            wanted = "unknown" if field not in kinds else f"no {kinds[field].__name__}"
            raise ConfigError(f"models: {field!r:.60} of {entry!r:.200} is {wanted}", param="models")
    if not fields.get("model"):
        raise ConfigError(f"models: {entry!r:.200} names no model", param="models")
    return Source(**fields)


def _load(settings: GatewaySettings, source: Source) -> ServedModel:
    model, overrides = source.model, source.hf_overrides
    folder: Path = resolve_model(model, source.revision)
    described = describe_model(
        folder, read_config(folder, overrides), with_sampling_defaults=settings.generation_config == "auto"
    )
    identity = ModelIdentity(
        source.name or model_name(model, folder),
        model_revision(folder, overrides) if settings.load_format == "auto" else "",
        described.tokenizer_digest,
    )
    if not described.stop_token_ids:
        log.warning("gateway.no_stop_ids", model=identity.name, folder=str(folder))
    if described.sampling_defaults != SamplingDefaults():
        defaults = dataclasses.asdict(described.sampling_defaults)
        log.info("gateway.model_defaults", model=identity.name, **defaults)
    return ServedModel(identity, Tokenizer(described))
