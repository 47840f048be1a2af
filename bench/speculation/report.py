"""The rows of bench.speculation as a table: medians of rounds, ratios within each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

Row = dict[str, Any]

OURS = "pdq"
PROPOSERS = ("off", "ngram", "draft", "ngram+draft")

HEADER = (
    f"{'':27}{'tok/s':>8}{'/ off':>8}{'(least–most)':>15}{'all':>7}{'tok/step':>10}{'of ideal':>10}"
    f"{'accepted':>10}  same  of drafts, how many reach the 1st, 2nd, … token"
)


def text(results: dict[str, list[Row]]) -> str:
    return "\n".join(_lines(results))


def _lines(results: dict[str, list[Row]]) -> Iterator[str]:
    for about in results["runs"]:
        yield f"$ {about['command']}"
        yield f"{about['machine']}; before: {about['limits'][0]}; after: {about['limits'][1]}"

    def place(row: Row) -> tuple[Any, ...]:
        return row["kind"], row["streams"], row["temperature"]

    def system(row: Row) -> tuple[Any, ...]:
        return row["system"], row["proposer"]

    for (kind, streams, temperature), rows in _grouped(results["rows"], place):
        yield f"\n{kind}, {streams} {'stream' if streams == 1 else 'streams'}, T={temperature:g}"
        yield HEADER
        rows.sort(key=lambda row: PROPOSERS.index(row["proposer"]))
        rows.sort(key=lambda row: row["system"] != OURS)
        for name, of_one in _grouped(rows, system):
            yield _line(" ".join(name), of_one)


def _grouped(
    rows: list[Row], key: Callable[[Row], tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """In the order in which they were met first."""
    order = list(dict.fromkeys(map(key, rows)))
    ordered = sorted(rows, key=lambda row: order.index(key(row)))
    return ((name, list(of)) for name, of in groupby(ordered, key))


def _line(name: str, rows: list[Row]) -> str:
    rates = [row["tokens"] / row["seconds"] for row in rows]
    gains = [rate / row["off_rate"] for rate, row in zip(rates, rows, strict=True)]
    whole = statistics.median(row["off_all_seconds"] / row["all_seconds"] for row in rows)
    per_step = [row["tokens_per_step"] for row in rows]
    line = f"  {name:25}{statistics.median(rates):8.1f}"
    if rows[0]["proposer"] == "off":
        return line
    line += f"{statistics.median(gains):8.2f}{f'({min(gains):.2f}–{max(gains):.2f})':>15}{whole:7.2f}"
    if None in per_step:
        return line + f"{'':30}{_share(row['same'] for row in rows):>6}"
    ideal = statistics.median(gain / tokens for gain, tokens in zip(gains, per_step, strict=True))
    drafts, drafted, accepted = (sum(row[of] for row in rows) for of in ("drafts", "drafted", "accepted"))
    line += f"{statistics.median(per_step):10.2f}{ideal:10.2f}{accepted / drafted if drafted else 0.0:10.2f}"
    line += f"{_share(row['same'] for row in rows):>6}  "
    reached = [
        sum(counts) / drafts for counts in zip(*(row["accepted_at"] for row in rows), strict=True) if drafts
    ]
    return line + " ".join(f"{share:.2f}" for share in reached)


def _share(same: Iterator[bool]) -> str:
    found = list(same)
    return f"{sum(found)}/{len(found)}"
