"""What a node says at `/metrics`, as Prometheus reads it."""

from __future__ import annotations

import dataclasses

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclasses.dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one answer."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __getitem__(self, name: str) -> float:
        """The value of the sample without labels."""
        return self.samples[name, frozenset()]

    def get(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 if there is none, as for what has not happened."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str) -> float:
        """Over all labels."""
        return sum(value for (of, _), value in self.samples.items() if of == name)


def parsed(text: str) -> Scrape:
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


async def scrape(url: str) -> Scrape:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/metrics")
    assert answer.status_code == 200, answer.text
    return parsed(answer.text)
