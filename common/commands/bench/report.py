"""From exchanges to numbers: percentiles, rates, goodput, and their table.

Owns: every definition of what is reported.

    TTFT   arrival → first event with text (arrival: when the schedule says, not when it was sent)
    ITL    between two events with text of one answer; an event may carry several tokens
    TPOT   (last event - first event) / (output tokens - 1), per request
    E2E    arrival → end of the answer
    late   arrival → sent: what the client itself added; part of TTFT and E2E
    goodput    requests per second that kept every target given
    rates  over the time from the first arrival to the last answer, of requests that succeeded

Latencies are of requests that succeeded; the others are counted by code. Percentiles interpolate
linearly between ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from common.commands.bench.client import Answer, Exchange
from common.commands.bench.workload import Job
from common.commands.inspect import table_of
from common.commands.processes import Use

LATE_LIMIT_S = 0.01
"""If one request in a hundred is sent later than that, the client is part of what it measures."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One request: what was wanted, when it arrived, and what came of it. Times are seconds from
    the start of the run."""

    job: Job
    arrived_at: float
    sent_at: float
    ended_at: float
    answer: Answer
    event_times: tuple[float, ...]

    @classmethod
    def of(cls, job: Job, arrived: float, exchange: Exchange, answer: Answer, start: float) -> Outcome:
        """`start` and `arrived` are on the client's clock."""
        times = tuple(moment - start for moment in answer.token_times)
        return cls(job, arrived - start, exchange.sent_at - start, exchange.ended_at - start, answer, times)

    @property
    def ok(self) -> bool:
        return not self.answer.error and bool(self.event_times)

    @property
    def error(self) -> str:
        return "" if self.ok else self.answer.error or "no_output"

    @property
    def late_s(self) -> float:
        return self.sent_at - self.arrived_at

    @property
    def ttft_s(self) -> float:
        return self.event_times[0] - self.arrived_at

    @property
    def e2e_s(self) -> float:
        return self.ended_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        count = self.answer.output_tokens
        return (self.event_times[-1] - self.event_times[0]) / (count - 1) if count > 1 else None

    @property
    def itls_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.event_times)]

    def keeps(self, ttft_slo: float | None, tpot_slo: float | None) -> bool:
        if not self.ok:
            return False
        first = ttft_slo is None or self.ttft_s <= ttft_slo
        return first and (tpot_slo is None or (self.tpot_s or 0.0) <= tpot_slo)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values; NaN of none."""
    if not ordered:
        return math.nan
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(values: Iterable[float]) -> dict[str, float | int | None]:
    """mean, p50, p90, p99, max and how many; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    return {
        "count": len(ordered),
        "mean": math.fsum(ordered) / len(ordered),
        **{f"p{p}": percentile(ordered, p) for p in (50, 90, 99)},
        "max": ordered[-1],
    }


def summarize(outcomes: Sequence[Outcome], ttft_slo: float | None, tpot_slo: float | None) -> dict[str, Any]:
    """All numbers of a run; times in seconds."""
    good = [outcome for outcome in outcomes if outcome.ok]
    duration_s = max((outcome.ended_at for outcome in outcomes), default=0.0)

    def per_second(amount: int) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    prompt_tokens = sum(outcome.answer.prompt_tokens for outcome in good)
    output_tokens = sum(outcome.answer.output_tokens for outcome in good)
    kept = sum(outcome.keeps(ttft_slo, tpot_slo) for outcome in outcomes)
    wanted = ttft_slo is not None or tpot_slo is not None
    return {
        "duration_s": duration_s,
        "succeeded": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if not outcome.ok)),
        "finish_reasons": dict(Counter(outcome.answer.finish_reason for outcome in good)),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(outcome.answer.cached_tokens for outcome in good),
        "output_tokens": output_tokens,
        "requests_per_s": per_second(len(good)),
        "prompt_tokens_per_s": per_second(prompt_tokens),
        "output_tokens_per_s": per_second(output_tokens),
        "ttft_s": distribution(outcome.ttft_s for outcome in good),
        "itl_s": distribution(itl for outcome in good for itl in outcome.itls_s),
        "tpot_s": distribution(o.tpot_s for o in good if o.tpot_s is not None),
        "e2e_s": distribution(outcome.e2e_s for outcome in good),
        "late_s": distribution(outcome.late_s for outcome in outcomes),
        "goodput": {
            "ttft_slo_s": ttft_slo,
            "tpot_slo_s": tpot_slo,
            "requests_per_s": per_second(kept),
            "share": kept / len(outcomes) if outcomes else 0.0,
        }
        if wanted
        else None,
    }


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One entry per request, for the JSON file."""
    return [
        {
            "index": o.job.index,
            "arrived_at_s": round(o.arrived_at, 6),
            "late_s": round(o.late_s, 6),
            "ended_at_s": round(o.ended_at, 6),
            "prompt_tokens": o.answer.prompt_tokens,
            "cached_tokens": o.answer.cached_tokens,
            "output_tokens": o.answer.output_tokens,
            "finish_reason": o.answer.finish_reason,
            "error": o.error,
            "message": o.answer.message,
            "event_times_s": [round(moment, 6) for moment in o.event_times],
        }
        for o in outcomes
    ]


def show(out: Console, summary: dict[str, Any], uses: Sequence[Use], client_cores: float) -> None:
    """The table for a person."""
    out.print(
        f"{summary['succeeded']} requests in {summary['duration_s']:.2f} s: "
        f"{summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s, "
        f"{summary['prompt_tokens_per_s']:.1f} prompt tokens/s "
        f"({summary['cached_tokens']} of {summary['prompt_tokens']} cached)"
    )
    table = table_of("ms", ">mean", ">p50", ">p90", ">p99", ">max", ">count")
    for name in ("ttft", "itl", "tpot", "e2e", "late"):
        values = summary[f"{name}_s"]
        shown = [
            "-" if values[key] is None else f"{values[key] * 1000:.2f}"
            for key in ("mean", "p50", "p90", "p99", "max")
        ]
        label = name.upper() if name != "late" else "sent late"
        table.add_row(label, *shown, str(values["count"]))
    out.print()
    out.print(table, crop=False)
    out.print()
    if (goodput := summary["goodput"]) is not None:
        targets = " and ".join(
            f"{name} <= {goodput[key]:g} s"
            for name, key in (("TTFT", "ttft_slo_s"), ("TPOT", "tpot_slo_s"))
            if goodput[key] is not None
        )
        out.print(
            f"goodput: {goodput['requests_per_s']:.2f} requests/s, {goodput['share']:.1%} of all ({targets})"
        )
    if summary["errors"]:
        counts = ", ".join(f"{code} {count}" for code, count in summary["errors"].items())
        out.print(f"failed: {summary['failed']} ({counts})", style="bold red")
    if uses:
        _show_uses(out, uses)
    out.print(f"client: {client_cores:.1%} of a core")
    if (summary["late_s"]["p99"] or 0.0) > LATE_LIMIT_S:
        out.print(
            f"the client was late (p99 {summary['late_s']['p99'] * 1000:.0f} ms): it lacks a core "
            "of its own, and the latencies include that",
            style="bold yellow",
        )


def _show_uses(out: Console, uses: Sequence[Use]) -> None:
    table = table_of("process", ">pid", ">PSS MB", ">RSS MB", ">of a core")
    for use in uses:
        pss = "-" if use.pss_bytes is None else f"{use.pss_bytes / 1e6:.0f}"
        table.add_row(use.name, str(use.pid), pss, f"{use.rss_bytes / 1e6:.0f}", f"{use.cores_used:.1%}")
    out.print(table, crop=False)
    out.print()
