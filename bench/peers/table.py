"""Figures of several systems side by side, then each as a ratio to one of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

LABEL, WIDTH = 26, 21


def table(figures: Mapping[str, Mapping[str, Sequence[float]]], against: str) -> list[str]:
    """Lines of text. `figures`: label → name of a system → its values, in the unit that the label
    says. Shown are median, least and most; a ratio is one of medians."""
    names = _names(figures)
    lines = [*spreads(figures), f"  median / that of {against}"]
    for label, of in figures.items():
        if base := of.get(against):
            ratios = [_ratio(of.get(name, ()), statistics.median(base)) for name in names]
            lines.append(line(label.rpartition(",")[0], ratios))
    return lines


def spreads(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The first part of `table`."""
    names = _names(figures)
    return [
        line("", names),
        *(line(label, [_spread(of.get(name, ())) for name in names]) for label, of in figures.items()),
    ]


def line(label: str, cells: Sequence[str], width: int = WIDTH) -> str:
    return f"  {label:{LABEL}}" + "".join(f" {cell:>{width - 1}}" for cell in cells)


def _names(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    return list(dict.fromkeys(name for of in figures.values() for name in of))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    digits = 1 if max(values) >= 100 else 2
    parts = statistics.median(values), min(values), max(values)
    median, least, most = (f"{value:.{digits}f}" for value in parts)
    return f"{median} ({least}–{most})" if len(values) > 1 else median


def _ratio(values: Sequence[float], base: float) -> str:
    return f"{statistics.median(values) / base:.3f}" if values else "–"
