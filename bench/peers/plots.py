"""The curves of `rates.py`: latency of chats and goodput over the request rate, an SVG file each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from bench.peers.rates import TARGETS

Curves = Mapping[str, Mapping[float, Mapping[str, float]]]
COLORS = {
    "pdq": "tab:blue",
    "pdq 1P1D": "tab:green",
    "vLLM": "tab:orange",
    "transformers": "tab:gray",
    "vLLM 1P1D": "tab:purple",
    "vLLM 1P1D reniced": "tab:red",
}


def draw(curves: Curves, folder: Path, about: str, suffix: str = "svg") -> list[Path]:
    """`rates_latency` and `rates_goodput`, in the format that `suffix` names."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pdq"  # the same picture is the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    return [
        _figure(
            folder / f"rates_latency.{suffix}",
            about,
            curves,
            (
                ("first token of chats, s (p50 solid, p99 dashed)", ("ttft_p50_s", "ttft_p99_s"), True),
                ("between tokens of chats, s (p50 solid, p99 dashed)", ("gap_p50_s", "gap_p99_s"), True),
            ),
        ),
        _figure(
            folder / f"rates_goodput.{suffix}",
            about,
            curves,
            tuple((f"in time per second; {t.name}", (f"goodput {t.name}",), False) for t in TARGETS),
        ),
    ]


def _figure(
    path: Path, about: str, curves: Curves, panels: tuple[tuple[str, tuple[str, ...], bool], ...]
) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.2), layout="constrained")
    figure.suptitle(about, fontsize=9)
    for axis, (title, keys, logarithmic) in zip(axes, panels, strict=True):
        for system, points in curves.items():
            for key, style in zip(keys, ("-", "--"), strict=False):
                _curve(axis, system, points, key, style)
        if not logarithmic:
            offered = {rate: of["offered"] for points in curves.values() for rate, of in points.items()}
            rates = sorted(offered)
            axis.plot(rates, [offered[r] for r in rates], color="0.7", linestyle=":", label="offered")
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="chats per second", yscale="log" if logarithmic else "linear")
        axis.title.set_fontsize(9)
        axis.grid(color="0.9")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return path


def _curve(axis: Any, system: str, points: Mapping[float, Mapping[str, float]], key: str, style: str) -> None:
    axis.plot(
        list(points),
        [of[key] for of in points.values()],
        style,
        marker="o",
        markersize=3,
        color=COLORS[system],
        label=system if style == "-" else None,
    )
