"""Log lines: one per event, whatever is in it."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from common import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger(logs.ROOT).level)
    stream = io.StringIO()
    logs.configure("node-1", "info", stream)
    yield stream
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.getLogger(logs.ROOT).setLevel(before[2])


def test_a_line_has_time_level_service_event_and_values(stream: io.StringIO) -> None:
    logs.get_logger("queue", node="n").bind(request="r-1").info("taken", seconds=0.25, empty="")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO node-1 taken "
        r'node=n request=r-1 seconds=0\.25 empty=""\n',
        stream.getvalue(),
    )


def test_hostile_values_stay_on_one_line_and_in_their_quotes(stream: io.StringIO) -> None:
    logs.get_logger().info("said", text='a "b"\nERROR forged\x1b[31m', path="C:\\x")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r'text="a \"b\"\nERROR forged\x1b[31m" path=C:\\x')


def test_an_exception_is_part_of_the_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("no\nway")
    except ValueError as error:
        logs.get_logger().error("failed", exc_info=error)
    (line,) = stream.getvalue().splitlines()
    assert "Traceback" in line
    assert "ValueError" in line


def test_lines_below_the_level_and_of_chatty_libraries_are_left_out(stream: io.StringIO) -> None:
    logs.get_logger().debug("fine")
    logging.getLogger("somelibrary").info("chatter")
    logging.getLogger("somelibrary").warning("this %s", "matters")
    (line,) = stream.getvalue().splitlines()
    assert 'WARNING node-1 somelibrary message="this matters"' in line


def test_a_flood_of_one_event_passes_in_part_and_says_how_many_it_left_out() -> None:
    now = 0.0
    limit = logs.RateLimit(burst=3, window_s=10, clock=lambda: now)

    def passed(event: str, level: int = logging.WARNING) -> logging.LogRecord | None:
        record = logging.LogRecord("pdq.x", level, "", 0, "%s", (event,), None)
        record.values = {}
        return record if limit.filter(record) else None

    assert sum(passed("flood") is not None for _ in range(1000)) == 3
    assert passed("other")
    assert all(passed("flood", logging.INFO) for _ in range(100))
    now = 10.0
    after = passed("flood")
    assert after
    assert after.suppressed == 997  # type: ignore[attr-defined]


def test_many_different_events_hold_no_memory() -> None:
    limit = logs.RateLimit()
    for number in range(logs.MOST_EVENTS * 3):
        limit.filter(logging.LogRecord("x", logging.ERROR, "", 0, f"event {number}", None, None))
    assert len(limit._seen) <= logs.MOST_EVENTS


def test_other_libraries_are_counted_by_their_message_without_its_values(stream: io.StringIO) -> None:
    for number in range(logs.BURST * 2):
        logging.getLogger("library").warning("cannot do %d", number)
    assert len(stream.getvalue().splitlines()) == logs.BURST


def test_a_value_of_megabytes_is_cut(stream: io.StringIO) -> None:
    logs.get_logger().warning("said", text="x" * 10**6, error=ValueError("y" * 10**6))
    assert len(stream.getvalue()) < 3 * logs.LONGEST_VALUE
