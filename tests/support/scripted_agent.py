"""AgentServer and TurnLedger in memory: answers from a list, and a ledger that remembers what went through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from controller.core.digest import sha256_json
from controller.core.errors import FixtureMissing, SisuError
from controller.core.model import Recorded, TurnReply, TurnRequest
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

    def look(self, request: TurnRequest) -> Recorded:
        reply = self.replies.get(_key(request))
        failed = [type(error).__name__ for one, error in self.failures if _key(one) == _key(request)]
        spent = sum(one.tokens_in + one.tokens_out for one in self.replies.values())
        spent += sum(sum(error.tokens) for _, error in self.failures if isinstance(error, SisuError))
        return Recorded(reply=reply, error=failed[-1] if failed and reply is None else None, spent=spent)

    def put(self, request: TurnRequest, reply: TurnReply) -> None:
        self.replies[_key(request)] = reply

    def failed(self, request: TurnRequest, error: Exception) -> None:
        self.failures.append((request, error))


def _key(request: TurnRequest) -> str:
    return sha256_json([request.session, request.agent, request.prompt, request.commit, list(request.history)])
