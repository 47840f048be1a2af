"""Log lines: one line per event, to stderr, made of time, level, service, event and key=value.

Owns: their form. Knows nothing of what is logged.

    2026-01-31T09:15:00.123Z INFO gateway-1f3a request.accepted request=r-7 prompt_len=12

An event is a dotted name that never changes, so that it can be searched for; everything that varies
is a key. A line never breaks: control characters are escaped.

The log is bounded whatever happens: a value is cut at 2,000 characters, and of one event (of other
libraries: of one message before its values are filled in) at level warning or above, 50 lines pass
in 10 seconds; the next one that passes counts those left out as `suppressed`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from common.errors import shortened

ROOT = "pdq"
LONGEST_VALUE = 2_000  # characters
LONGEST_TRACEBACK = 16_000
BURST, WINDOW_S = 50, 10.0  # lines of one event, and in what time
MOST_EVENTS = 1_000  # counted apart; beyond them all counts start anew


class Logger:
    """Writes events with the keys it is bound to. Cheap; make one where it is needed."""

    __slots__ = ("_logger", "_values")

    def __init__(self, logger: logging.Logger, values: Mapping[str, Any]) -> None:
        self._logger = logger
        self._values = values

    def bind(self, **values: Any) -> Logger:
        """The same logger with further keys on each line, such as `request=…`."""
        return Logger(self._logger, {**self._values, **values})

    def debug(self, event: str, **values: Any) -> None:
        self._log(logging.DEBUG, event, values)

    def info(self, event: str, **values: Any) -> None:
        self._log(logging.INFO, event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._log(logging.WARNING, event, values)

    def error(self, event: str, *, exc_info: BaseException | None = None, **values: Any) -> None:
        """`exc_info` adds the traceback, escaped into the same line."""
        self._log(logging.ERROR, event, values, exc_info)

    def _log(
        self, level: int, event: str, values: Mapping[str, Any], exc_info: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"values": {**self._values, **values}}
            self._logger.log(level, "%s", event, extra=extra, exc_info=exc_info)


class RateLimit(logging.Filter):
    """Lets `burst` records of one event pass per window; records below warning always pass."""

    def __init__(
        self, burst: int = BURST, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._burst, self._window_s, self._clock = burst, window_s, clock
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # begin of the window, records

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        ours = hasattr(record, "values")
        event = (record.name, record.getMessage() if ours else str(record.msg)[:LONGEST_VALUE])
        now = self._clock()
        begin, count = self._seen.get(event, (now, 0))
        suppressed = 0
        if now - begin >= self._window_s:
            suppressed = max(0, count - self._burst)
            begin, count = now, 0
        if len(self._seen) >= MOST_EVENTS and event not in self._seen:
            self._seen.clear()
        self._seen[event] = (begin, count + 1)
        if suppressed:
            record.suppressed = suppressed
        return count < self._burst


class LineFormatter(logging.Formatter):
    """The form of a line; records of other libraries come out in it too."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        values: dict[str, Any] = dict(getattr(record, "values", {}))
        event = record.getMessage()
        if not hasattr(record, "values"):
            event, values = record.name, {"message": event}
        values = {key: _bounded(value) for key, value in values.items()}
        if record.exc_info and record.exc_info[0] is not None:
            values["traceback"] = shortened(self.formatException(record.exc_info), LONGEST_TRACEBACK)
        if suppressed := getattr(record, "suppressed", 0):
            values["suppressed"] = suppressed
        time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in values.items())
        return f"{time} {record.levelname} {self._service} {_escaped(event)}{pairs}"


def configure(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all log lines of this process to `stream` (stderr), named after `service`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(service))
    handler.addFilter(RateLimit())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(ROOT).setLevel(level.upper())


def get_logger(name: str = "", **values: Any) -> Logger:
    """A logger for one part of the program, such as "bus"."""
    return Logger(logging.getLogger(f"{ROOT}.{name}" if name else ROOT), values)


def _bounded(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else shortened(str(value), LONGEST_VALUE)


def _quoted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _escaped(str(value))
    return f'"{text}"' if not text or any(c in text for c in ' "=') else text


def _escaped(text: str) -> str:
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
