"""AgentServer and TurnLedger in memory: answers from a list, and a ledger that remembers what went through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from controller.core.digest import sha256_json
from controller.core.errors import FixtureMissing
from controller.core.model import TurnReply, TurnRequest
from controller.ports import never


@dataclass(kw_only=True)
class ScriptedAgent:
    """Gives `answers` in order: structured values, or exceptions to raise. Keeps the requests."""

    answers: Sequence[Any]
    tokens: int = 10
    requests: list[TurnRequest] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    mode: str = "replay"

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        self.requests.append(request)
        if len(self.requests) > len(self.answers):
            raise FixtureMissing(f"the script has {len(self.answers)} answers only")
        answer = self.answers[len(self.requests) - 1]
        if isinstance(answer, Exception):
            raise answer
        return TurnReply(
            session=request.session,
            structured=answer,
            raw_text="",
            tool_calls=(),
            tokens_in=self.tokens,
            tokens_out=0,
            timings={},
        )

    def end_session(self, session: str) -> None:
        self.ended.append(session)


@dataclass(kw_only=True)
class MemoryLedger:
    """TurnLedger over a dictionary."""

    replies: dict[str, TurnReply] = field(default_factory=dict)
    failures: list[tuple[TurnRequest, Exception]] = field(default_factory=list)

    def get(self, request: TurnRequest) -> TurnReply | None:
        return self.replies.get(_key(request))

    def put(self, request: TurnRequest, reply: TurnReply) -> None:
        self.replies[_key(request)] = reply

    def failed(self, request: TurnRequest, error: Exception) -> None:
        self.failures.append((request, error))

    def tried(self, request: TurnRequest) -> str | None:
        if _key(request) in self.replies:
            return None
        found = [type(error).__name__ for one, error in self.failures if _key(one) == _key(request)]
        return found[-1] if found else None

    def spent(self) -> int:
        return sum(reply.tokens_in + reply.tokens_out for reply in self.replies.values())


def _key(request: TurnRequest) -> str:
    return sha256_json([request.session, request.agent, request.prompt, request.commit, list(request.history)])
