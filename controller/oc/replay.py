"""AgentServer from recorded turns: OC_MODE=replay. No daemon, no model, and no answer that was not recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from controller.core.model import TurnReply, TurnRequest
from controller.oc import fixture
from controller.ports import never


class ReplayAgent:
    """Serves the fixtures of one folder."""

    mode = "replay"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        """See ports.AgentServer. Raises FixtureMissing for a turn that was not recorded."""
        started = time.monotonic()
        reply = fixture.read(self._directory, request)
        return replace(reply, timings={"total": round((time.monotonic() - started) * 1000)})

    def end_session(self, session: str) -> None:
        """Nothing is kept between turns."""
