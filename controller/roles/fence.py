"""The end of a process that must not go on."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def fence_off(reason: str) -> None:
    """End at once, without clean-up: somebody else may already be doing this process' work."""
    log.critical("fenced off", extra={"reason": reason})
    logging.shutdown()
    os._exit(75)
