"""Log lines: one JSON object each, or plain text on a terminal.

Purpose: how records look, and what the one line at the end of a request says.
Does not know: routes, models.
Invariant: one record is one line whatever users send, and it holds no prompt, no answer and no key.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TextIO

request_id_var: ContextVar[str] = ContextVar("megpt_request_id", default="")
"""The id of the request that the current task serves; "" outside of requests."""

_RECORD_ATTRIBUTE: Final = "megpt_request"


@dataclass(slots=True)
class RequestRecord:
    """What is logged of a request when it ends. Times in seconds; None: does not apply."""

    id: str
    method: str
    route: str = "unmatched"
    status: int = 0
    client: str | None = None
    user: str | None = None
    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    duration_s: float = 0.0
    error: str | None = None
    started_s: float = field(default_factory=time.perf_counter)

    def told(self) -> dict[str, Any]:
        """The fields that apply, for the log."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "started_s"}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in values.items()
            if value is not None
        }


def log_request(logger: logging.Logger, record: RequestRecord, *, quiet: bool = False) -> None:
    """Write the line of a request that has ended; `quiet` ones are for DEBUG only."""
    level = logging.DEBUG if quiet else logging.INFO
    if record.status >= 500 and record.status != 503:
        level = logging.ERROR
    logger.log(
        level,
        "%s %s %d in %.3f s",
        record.method,
        record.route,
        record.status,
        record.duration_s,
        extra={_RECORD_ATTRIBUTE: record.told()},
    )


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message, request_id and a request's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. JSON escapes whatever could start another one."""
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_var.get():
            line["request_id"] = request_id
        if (told := getattr(record, _RECORD_ATTRIBUTE, None)) is not None:
            line["request"] = told
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """Time, level, logger and message; a request's fields as name=value; tracebacks on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, control characters escaped."""
        text = f"{_utc(record)} {record.levelname:<7} {record.name}: {record.getMessage()}"
        if (told := getattr(record, _RECORD_ATTRIBUTE, None)) is not None:
            shown = [f"{k}={v}" for k, v in told.items() if k not in ("method", "route", "status")]
            text += " " + " ".join(shown)
        elif request_id := request_id_var.get():
            text += f" id={request_id}"
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


def configure_logging(
    level: str, style: Literal["auto", "json", "human"], stream: TextIO | None = None
) -> logging.Handler:
    """Make the root logger write to `stream` (standard error). Returns the handler, for removal in tests."""
    target = stream or sys.stderr
    human = style == "human" or (style == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # our own line per request takes its place
    return handler


def _utc(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
