"""Figures of several systems side by side, then each as a ratio to one of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

LABEL, WIDTH = 26, 21


def table(figures: Mapping[str, Mapping[str, Sequence[float]]], against: str) -> list[str]:
    """Lines of text. `figures`: label → name of a system → its values, in the unit that the label
    says. Shown are median, least and most; a ratio is one of medians."""
    names = list(dict.fromkeys(name for of in figures.values() for name in of))
    lines = [_line("", names)]
    lines += [_line(label, [_spread(of.get(n, ())) for n in names]) for label, of in figures.items()]
    lines.append(f"  median / that of {against}")
    for label, of in figures.items():
        if base := of.get(against):
            ratios = [_ratio(of.get(name, ()), statistics.median(base)) for name in names]
            lines.append(_line(label.rpartition(",")[0], ratios))
    return lines


def _line(label: str, cells: Sequence[str]) -> str:
    return f"  {label:{LABEL}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    digits = 1 if max(values) >= 100 else 2
    parts = statistics.median(values), min(values), max(values)
    median, least, most = (f"{value:.{digits}f}" for value in parts)
    return f"{median} ({least}–{most})" if len(values) > 1 else median


def _ratio(values: Sequence[float], base: float) -> str:
    return f"{statistics.median(values) / base:.3f}" if values else "–"
