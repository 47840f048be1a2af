"""What a config says about rotary embedding, in one form, and how far the positions reach by it.

Owns: the spellings of `rope_parameters` (transformers 5), `rope_scaling` and `rope_theta` (before),
and which of them holds; and the context length that follows. The formulas are the engine's
(common/engine/model/rope.py). Knows nothing of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.errors import UnsupportedModel
from common.model_folder.reading import integer, number, section, wrong

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
FILE = "config.json"
LARGEST = 1e12  # of any parameter: the formulas take logarithms and powers of them


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequency, and how it is scaled.

    `original` is the length before scaling, `positions` how far the model reaches with it.
    """

    theta: float
    kind: str
    factor: float
    original: int
    positions: int
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive parameter of the scaling; raises `UnsupportedModel` when it is none."""
        path = f"rope_parameters.{name}"
        value = number(self.parameters, name, FILE, path)
        value = default if value is None else value
        if value is None or not 1 / LARGEST <= value <= LARGEST:
            raise wrong(FILE, path, f"a positive number, {LARGEST:.0e} at most", value)
        return value

    def factors(self, max_positions: int, count: int) -> list[float]:
        """The `count` divisors of a `longrope`, for a node that serves `max_positions`; raises
        `UnsupportedModel` where they are not so many positive numbers."""
        name = "long_factor" if max_positions > self.original else "short_factor"
        values = self.parameters.get(name)
        found = [
            number({name: value}, name, FILE, f"rope_parameters.{name}")
            for value in (values if isinstance(values, list) else ())
        ]
        usable = [value for value in found if value is not None and 1 / LARGEST <= value <= LARGEST]
        if len(found) != count or len(usable) != count:
            raise wrong(FILE, f"rope_parameters.{name}", f"a list of {count} positive numbers", values)
        return usable

    def numerics(self, max_positions: int) -> str:
        """What to add to the numerics class of a node that serves `max_positions`: nodes that turn
        by other factors compute other keys. Empty where the positions served change nothing."""
        if self.kind != "longrope":
            return ""
        return " longrope-long" if max_positions > self.original else " longrope-short"


def parse_rope(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """The rope of a `config.json`. Raises `UnsupportedModel` naming the field.

    `rope_scaling`, where somebody wrote it, holds, as in transformers: the cards of Qwen tell
    users to add it. A scaling without a base of its own is that of the model's base: the one at the
    top level, else, unlike there, that of `rope_parameters` beside it.
    """
    scaling = _one_set(config, "rope_scaling")
    given = _one_set(config, "rope_parameters")
    parameters = scaling or given
    where = "rope_scaling" if scaling else "rope_parameters"
    kind = parameters.get("rope_type") or parameters.get("type")
    if kind is None and parameters.get("factor") not in (None, 1):
        raise UnsupportedModel(f"{FILE}: {where} has a factor but no rope_type", param=where)
    kind = "default" if kind is None else kind
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"{FILE}: rope type {kind!r:.60} is not one of {', '.join(ROPE_TYPES)}",
            param="rope_parameters.rope_type",
        )
    for source in (config, given, scaling):
        # No family here turns a part of a head only; transformers ignores it or crashes.
        if source.get("partial_rotary_factor") not in (None, 1):
            raise UnsupportedModel(
                f"{FILE}: partial_rotary_factor {source['partial_rotary_factor']!r:.60} is not "
                "supported, only 1",
                param="partial_rotary_factor",
            )
    theta = next(
        (
            found
            for source in (parameters, config, given)
            if (found := number(source, "rope_theta", FILE)) is not None
        ),
        10_000.0,
    )
    if not 1.0 < theta <= LARGEST:
        raise wrong(FILE, "rope_theta", f"above 1, {LARGEST:.0e} at most", theta)
    original = max_position_embeddings
    if kind in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        # The one at the top level wins, as in transformers.
        original = integer(config, name, FILE) or integer(parameters, name, FILE) or original
    rope = RopeConfig(theta, kind, 1.0, original, max_position_embeddings, parameters)
    if kind == "default":
        return rope
    if kind == "longrope" and original < 2:  # its logarithm divides
        raise wrong(FILE, "original_max_position_embeddings", "at least 2", original)
    written = max_position_embeddings / original if kind in ("yarn", "longrope") else None
    rope = dataclasses.replace(rope, factor=rope.number("factor", written))
    return dataclasses.replace(rope, positions=_positions(rope))


def _positions(rope: RopeConfig) -> int:
    """How many positions the model serves, as vLLM derives it (`_get_and_verify_max_len`).

    `linear` and `yarn` reach `factor` times as far as without. The authors of a `llama3` or a
    `longrope` model have written the length it reaches into `max_position_embeddings`. `dynamic`
    cannot go beyond that with cached keys (see common/engine/model/rope.py).
    """
    if rope.kind not in ("linear", "yarn"):
        return rope.positions
    reach = (rope.positions if rope.kind == "linear" else rope.original) * rope.factor
    if not 1 <= reach < 2**31:
        raise wrong(FILE, "rope_parameters.factor", "one that leaves a usable length", reach)
    return int(reach)


def _one_set(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    given = section(config, field, FILE)
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel(f"{FILE}: {field} must be one set of parameters for all layers", param=field)
    return given
