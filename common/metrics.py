"""Metrics of one process, as Prometheus reads them.

Owns: the door to prometheus_client, and the rule for names: `pdq_`, then the noun, then the unit
(`_seconds`, `_bytes`, `_tokens`), `_total` for counters. Knows no particular metric: whoever counts
something makes its own from the `Metrics` it was given. No global registry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Counter", "Gauge", "Histogram", "Metrics"]

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_NAME = re.compile(r"pdq_[a-z0-9]+(_[a-z0-9]+)*")


class Metrics:
    """The metrics of one process; a name can be made once only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)

    def counter(self, name: str, about: str, labels: Sequence[str] = ()) -> Counter:
        """`name` ends in `_total`."""
        if not name.endswith("_total"):
            raise ValueError(f"a counter's name ends in _total, not {name!r}")
        return Counter(_checked(name), about, labels, registry=self.registry)

    def gauge(self, name: str, about: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(_checked(name), about, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        about: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = SECONDS,
    ) -> Histogram:
        """`buckets` are upper bounds, ascending; the default suits durations in seconds."""
        return Histogram(_checked(name), about, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The text of `/metrics`, of type `CONTENT_TYPE_LATEST`."""
        return generate_latest(self.registry)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a metric's name looks like pdq_noun_unit, not {name!r}")
    return name
