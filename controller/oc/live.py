"""AgentServer over a running OpenCode daemon: one daemon session per session of ours, a deadline per turn, an abort behind it.

Success is a `structured` answer, nothing else; everything else becomes an error or a reply without one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.core.errors import Permanent, SisuError, Unavailable
from controller.core.model import TurnReply, TurnRequest
from controller.oc.client import OpenCodeClient

log = logging.getLogger(__name__)

TURN_SECONDS = 600.0
# The model answered, but not as asked: the caller may ask again.
_NO_ANSWER = frozenset({"StructuredOutputError", "MessageOutputLengthError"})
_TRY_AGAIN = frozenset({"MessageAbortedError", "UnknownError"})


@dataclass
class _Session:
    id: str
    sent: tuple[str, ...] = ()
    tokens_in: int = 0
    tokens_out: int = 0


class LiveAgent:
    """Safe for many threads as long as each session has one turn at a time. `turn_seconds` bounds a whole turn."""

    mode = "live"

    def __init__(self, client: OpenCodeClient, *, turn_seconds: float = TURN_SECONDS) -> None:
        self._client, self._turn_seconds = client, turn_seconds
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def turn(self, request: TurnRequest) -> TurnReply:
        """See ports.AgentServer."""
        started = time.monotonic()
        session = self._session(request)
        ready = time.monotonic()
        try:
            answer = self._client.prompt(
                session.id, agent=request.agent, text=request.prompt, schema=request.schema, seconds=self._turn_seconds
            )
            reply = self._reply(session, answer)
        except SisuError:
            # The turn may still run in the daemon, and its session holds half of it: leave neither behind.
            self.end_session(request.session)
            raise
        session.sent = (*session.sent, request.prompt)
        done = time.monotonic()
        timings = {"session": _ms(ready - started), "model": _ms(done - ready), "total": _ms(done - started)}
        return TurnReply(**{**reply, "session": session.id, "timings": timings})

    def end_session(self, session: str) -> None:
        """See ports.AgentServer. A daemon that does not answer is no reason to fail: it forgets when it restarts."""
        with self._lock:
            known = self._sessions.pop(session, None)
        if known is None:
            return
        with contextlib.suppress(SisuError):
            self._client.abort(known.id)
        try:
            self._client.delete(known.id)
        except SisuError as e:
            log.warning("opencode session not deleted", extra={"session": known.id, "error": str(e)})

    def _session(self, request: TurnRequest) -> _Session:
        """The daemon's session in which exactly request.history was said; a new one is told that history first."""
        with self._lock:
            known = self._sessions.get(request.session)
        if known is not None and known.sent == request.history:
            return known
        self.end_session(request.session)
        session = _Session(self._client.create_session(title=request.agent, agent=request.agent))
        with self._lock:
            self._sessions[request.session] = session
        for text in request.history:
            self._client.remind(session.id, agent=request.agent, text=text)
        session.sent = request.history
        return session

    def _reply(self, session: _Session, answer: Mapping[str, Any]) -> dict[str, Any]:
        info, parts = answer.get("info") or {}, answer.get("parts") or []
        structured = info.get("structured")
        if structured is None:
            _judge(info.get("error") or {}, info.get("finish"))
        before = session.tokens_in, session.tokens_out
        session.tokens_in, session.tokens_out = self._client.tokens(session.id)
        return {
            "structured": structured,
            "raw_text": "".join(part.get("text", "") for part in parts if part.get("type") == "text"),
            "tool_calls": tuple(_tool_call(part, structured) for part in parts if part.get("type") == "tool"),
            "tokens_in": session.tokens_in - before[0],
            "tokens_out": session.tokens_out - before[1],
        }


def _judge(error: Mapping[str, Any], finish: str | None) -> None:
    """Returns when the model did answer, only not as asked. Raises Unavailable or Permanent for every other failure."""
    name = str(error.get("name", ""))
    data = error.get("data") or {}
    if name in _NO_ANSWER or (not name and finish is not None):
        return
    message = f"OpenCode: {name or 'the turn ended without a result'}: {str(data.get('message', ''))[:300]}"
    if name in _TRY_AGAIN or not name or (name == "APIError" and data.get("isRetryable")):
        raise Unavailable(message)
    raise Permanent(message)


def _tool_call(part: Mapping[str, Any], structured: Any) -> dict[str, Any]:
    """A tool part without ids and times. The structured answer is not repeated."""
    state = part.get("state") or {}
    call = {"tool": part.get("tool"), "status": state.get("status")}
    return call if state.get("input") == structured else {**call, "input": state.get("input")}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
