"""AgentServer that asks another one and keeps what it answered: OC_MODE=record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from controller.core import storable
from controller.core.model import TurnReply, TurnRequest
from controller.oc import fixture
from controller.ports import AgentServer, never


class RecordingAgent:
    """Every answered turn becomes a fixture. `opencode` is the daemon's version, `model` names what answered behind it."""

    mode = "record"

    def __init__(self, agent: AgentServer, *, directory: Path, opencode: str, model: str) -> None:
        self._agent, self._directory, self._opencode, self._model = agent, directory, opencode, model

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        """See ports.AgentServer."""
        reply = self._agent.turn(request, canceled=canceled)
        if storable.problem([reply.structured, reply.raw_text, *reply.tool_calls]) is not None:
            return reply  # no file carries it, and the compile loop refuses it right after this
        fixture.write(self._directory, request, reply, opencode=self._opencode, model=self._model)
        return reply

    def end_session(self, session: str) -> None:
        """See ports.AgentServer."""
        self._agent.end_session(session)
