"""Metrics of one process, as Prometheus reads them.

Owns: the door to prometheus_client, and the rule for names: `pdq_`, then the noun, then the unit
(`_seconds`, `_bytes`, `_tokens`), `_total` for counters. Knows no particular metric: whoever counts
something makes its own from the `Metrics` it was given. No global registry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Counter", "Gauge", "Histogram", "Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Reading = float | Mapping[tuple[str, ...], float]
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
        self, name: str, about: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        """`buckets` are upper bounds, ascending; the default suits durations in seconds."""
        return Histogram(_checked(name), about, labels, buckets=buckets, registry=self.registry)

    def reads(self, name: str, about: str, read: Callable[[], Reading], labels: Sequence[str] = ()) -> None:
        """A metric that is kept elsewhere, and read when it is rendered: a counter if `name` ends in
        `_total`, else a gauge. With labels, `read` returns a value for each tuple of theirs."""
        self.registry.register(_Read(_checked(name), about, read, labels))

    def render(self) -> bytes:
        """The text of `/metrics`, of type `CONTENT_TYPE_LATEST`."""
        return generate_latest(self.registry)


class _Read:
    """A collector of one metric."""

    def __init__(self, name: str, about: str, read: Callable[[], Reading], labels: Sequence[str]) -> None:
        self._family: Callable[..., CounterMetricFamily | GaugeMetricFamily] = (
            CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        )
        self._name, self._about, self._read, self._labels = name, about, read, labels

    def describe(self) -> list[Metric]:
        return [self._empty()]

    def collect(self) -> Iterator[Metric]:
        family = self._empty()
        found = self._read()
        values = found if isinstance(found, Mapping) else {(): found}
        for labels, value in sorted(values.items()):
            family.add_metric(labels, value)
        yield family

    def _empty(self) -> CounterMetricFamily | GaugeMetricFamily:
        return self._family(self._name, self._about, labels=self._labels)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a metric's name looks like pdq_noun_unit, not {name!r}")
    return name
