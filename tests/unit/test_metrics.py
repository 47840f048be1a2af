"""Metrics: names by the rule, each once, and readable by Prometheus."""

from __future__ import annotations

import pytest

from common.metrics import Metrics


def test_what_was_counted_is_rendered() -> None:
    metrics = Metrics()
    metrics.counter("pdq_requests_total", "requests", ["state"]).labels("finished").inc(2)
    metrics.gauge("pdq_free_blocks", "free blocks").set(7)
    metrics.histogram("pdq_step_seconds", "step", buckets=(0.1, 1.0)).observe(0.5)
    text = metrics.render().decode()
    assert 'pdq_requests_total{state="finished"} 2.0' in text
    assert "pdq_free_blocks 7.0" in text
    assert 'pdq_step_seconds_bucket{le="1.0"} 1.0' in text


@pytest.mark.parametrize("name", ["requests_total", "pdq_Requests_total", "pdq__x_total", "pdq_n"])
def test_names_outside_the_rule_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Metrics().counter(name, "about")


def test_a_name_exists_once_per_process_part() -> None:
    metrics = Metrics()
    metrics.gauge("pdq_free_blocks", "free blocks")
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.gauge("pdq_free_blocks", "free blocks")
    Metrics().gauge("pdq_free_blocks", "free blocks")  # another registry, no clash
