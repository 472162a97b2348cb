"""OC_MODE=record: every answer that a file can carry becomes a fixture, and no answer ends the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.core.model import TurnReply, TurnRequest
from controller.oc.record import RecordingAgent
from controller.ports import never

REQUEST = TurnRequest(session="s", agent="compile", schema={}, prompt="p", commit="0" * 40)


class Says:
    """An agent with one answer."""

    mode = "live"

    def __init__(self, structured: Any) -> None:
        self._structured = structured

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        return TurnReply(
            session="s",
            structured=self._structured,
            raw_text="",
            tool_calls=(),
            tokens_in=1,
            tokens_out=1,
            timings={},
            problem=None,
        )

    def end_session(self, session: str) -> None:
        """Nothing to end."""


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("structured", "files"), [({"kind": "need"}, 1), ({"kind": "\ud800"}, 0), ({"kind": nested(20_000)}, 0)]
)
def test_what_no_file_carries_is_answered_and_not_recorded(tmp_path: Path, structured: Any, files: int) -> None:
    agent = RecordingAgent(Says(structured), directory=tmp_path, opencode="1", model="m")
    assert agent.turn(REQUEST).structured is structured
    assert len(list(tmp_path.iterdir())) == files
