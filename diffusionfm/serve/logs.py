"""Logs as JSON lines on stderr. No line holds a prompt unless the server was asked to log them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("diffusionfm.serve")


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, event, whatever `say` was given, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def say(event: str, **facts: Any) -> None:
    """Log an event and its facts."""
    LOG.info(event, extra={"facts": facts})


def to_stderr() -> None:
    """Send our own lines, and what the HTTP server has to say, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("diffusionfm.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
