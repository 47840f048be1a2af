"""The picture of a run: four panels in one PNG file. The only user of matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.commands.bench.report import Outcome
from common.errors import ConfigError, ResourceError


def check(path: str) -> None:
    """Before the run, because an hour later is too late."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib", param="plot"
        )
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {Path(path).parent}", param="plot")


def plot(path: str, title: str, outcomes: Sequence[Outcome]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [outcome for outcome in outcomes if outcome.ok]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    _curve(axes[0, 0], "TTFT (ms)", [outcome.ttft_s for outcome in good])
    _curve(axes[0, 1], "ITL (ms)", [itl for outcome in good for itl in outcome.itls_s])
    _curve(axes[1, 0], "end-to-end (ms)", [outcome.e2e_s for outcome in good])
    _timeline(axes[1, 1], outcomes)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error}", param="plot") from error
    finally:
        pyplot.close(figure)


def _curve(axis: Any, label: str, values_s: list[float]) -> None:
    """Share of the values that are at most x."""
    ordered = sorted(value * 1000 for value in values_s)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    axis.step(ordered, shares, where="post")
    for share in (0.5, 0.9, 0.99):
        axis.axhline(share, linewidth=0.5, color="0.7")
    axis.set(xlabel=label, ylabel="share", ylim=(0, 1.01))


def _timeline(axis: Any, outcomes: Sequence[Outcome]) -> None:
    """Open requests, and events with text per second."""
    changes = sorted([(o.arrived_at, 1) for o in outcomes] + [(o.ended_at, -1) for o in outcomes])
    times, open_now, level = [0.0], [0], 0
    for moment, change in changes:
        level += change
        times.append(moment)
        open_now.append(level)
    axis.step(times, open_now, where="post", color="tab:orange")
    axis.set(xlabel="time (s)", ylabel="open requests")
    events = [moment for o in outcomes for moment in o.event_times]
    if events:
        end = max(times[-1], max(events))
        width = end / 50 or 1.0
        counts = [0.0] * 51
        for moment in events:
            counts[min(50, int(moment / width))] += 1 / width
        right = axis.twinx()
        right.plot([width * (index + 0.5) for index in range(51)], counts)
        right.set(ylabel="events with text per s")
