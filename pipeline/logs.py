"""The log on stderr: lines of text for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from pipeline.errors import redact
from pipeline.printable import printable

_log = logging.getLogger(__name__)


class LogFormat(str, Enum):
    """The format of the log."""

    text = "text"
    json = "json"


def set_up(level: int, log_format: LogFormat) -> None:
    """Write the log of this package to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format is LogFormat.json else _Lines())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("pipeline").setLevel(level)


def are_json() -> bool:
    """Return whether the log is written as JSON."""
    return any(isinstance(handler.formatter, _JsonLines) for handler in logging.getLogger().handlers)


def tell(text: str, level: int = logging.WARNING, **fields: Any) -> None:
    """Write a line to stderr at any level of the log. fields: more keys of the line if the log is JSON."""
    if not are_json():
        print(printable(redact(text)), file=sys.stderr, flush=True)
        return
    record = _log.makeRecord(_log.name, level, __file__, 0, text, (), None, extra={"fields": fields})
    logging.getLogger().handle(record)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["trace"] = redact(self.formatException(record.exc_info))
        return json.dumps(content)
