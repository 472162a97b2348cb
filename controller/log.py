"""Logging, configured once: an event name as message, facts in `extra`; JSON in a cluster, readable on a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_QUIET = (
    "aiohttp.access",
    "kopf.objects",
    "kopf.activities",
    "httpx",
    "httpcore",
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
)


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts = {k: v for k, v in record.__dict__.items() if k not in _STANDARD and not k.startswith(("otel", "dbos"))}
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        if self._json:
            line = {"at": at, "level": record.levelname, "logger": record.name, "event": record.getMessage(), **facts}
            return json.dumps(line, default=str)
        return " ".join(
            [at, record.levelname, record.name, record.getMessage(), *(f"{k}={v}" for k, v in facts.items())]
        )


def configure(*, as_json: bool, level: str) -> None:
    """Install one handler on the root logger; chatty libraries speak at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=as_json))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
