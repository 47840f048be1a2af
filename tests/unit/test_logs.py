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
