"""AgentServer over a running OpenCode daemon: one daemon session per session of ours, made again from its prompts when it is gone.

Success is a `structured` answer, nothing else; everything else becomes an error or a reply without one. Turns run on an event
loop in a thread of its own, so that each can be watched while it runs; callers are ordinary threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from controller.core.errors import Permanent, SisuError, TurnStalled, Unavailable
from controller.core.model import TurnReply, TurnRequest
from controller.oc import turn as turns
from controller.oc.client import OpenCodeClient
from controller.oc.events import Events, Progress
from controller.ports import never

log = logging.getLogger(__name__)
T = TypeVar("T")

TURN_SECONDS = 300.0
CONCURRENCY = 8
DAEMON_SECONDS = 60.0  # a daemon that is being restarted on a busy machine takes 30 s
LOOK_SECONDS = 0.2
CANCEL_SECONDS = 0.5  # between two questions whether a turn that has not begun is canceled
TITLE = "sisu-kodo"


@dataclass
class _Session:
    id: str
    sent: tuple[str, ...] = ()
    prompts: int = 0  # those that were reverted, too: a message's id is never used twice
    counted: tuple[int, int] = (0, 0)  # tokens in and out of the turns that are in it


class LiveAgent:
    """Safe for many threads as long as each session has one turn at a time. `turn_seconds` bounds a whole turn.

    `version` is the pinned one: another daemon gets no prompt. `observe(outcome, seconds)` hears of every turn.
    """

    mode = "live"

    def __init__(
        self,
        base_url: str,
        *,
        password: str,
        version: str,
        turn_seconds: float = TURN_SECONDS,
        concurrency: int = CONCURRENCY,
        daemon_seconds: float = DAEMON_SECONDS,
        observe: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self._version, self._turn_seconds, self._daemon_seconds = version, turn_seconds, daemon_seconds
        self._observe = observe
        self._sessions: dict[str, _Session] = {}
        self._left: set[str] = set()  # ids that the daemon may still hold
        self._loop = asyncio.new_event_loop()
        self._client = OpenCodeClient(base_url, password=password)
        self._events = Events(self._client, greet=self._greet)
        self._slots = asyncio.Semaphore(concurrency)
        self._reader: asyncio.Task[None] | None = None
        threading.Thread(target=self._loop.run_forever, name="opencode", daemon=True).start()

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        """See ports.AgentServer."""
        began = time.monotonic()
        outcome = "ok"
        try:
            return self._run(self._turn(request, canceled))
        except SisuError as e:
            outcome = type(e).__name__
            raise
        finally:
            self._observe(outcome, time.monotonic() - began)

    def end_session(self, session: str) -> None:
        """See ports.AgentServer. A daemon that does not answer is no reason to fail: it forgets when it restarts."""
        self._run(self._end(session))

    def check(self) -> None:
        """Raises Permanent when another version than the pinned one answers; silence is no answer."""
        with contextlib.suppress(Unavailable):
            self._run(self._greet())

    def close(self) -> None:
        """End the connections. Turns that run are left to the daemon's end."""

        async def close() -> None:
            if self._reader is not None:
                self._reader.cancel()
            await self._client.close()

        self._run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    async def _turn(self, request: TurnRequest, canceled: Callable[[], bool]) -> TurnReply:
        queued = time.monotonic()
        await _unless(canceled, self._slots.acquire())
        try:
            started = time.monotonic()
            await _unless(canceled, self._reachable())
            bounds = turns.Bounds(seconds=self._turn_seconds, tokens=request.max_tokens, canceled=canceled)
            session = await self._session(request)
            ready = time.monotonic()
            answer = await self._asked(session, request, bounds)
            done = time.monotonic()
        finally:
            self._slots.release()
        timings = {
            "queued": _ms(started - queued),
            "session": _ms(ready - started),
            "model": _ms(done - ready),
            "total": _ms(done - queued),
        }
        return TurnReply(**{**answer, "session": session.id, "timings": timings})

    async def _asked(self, session: _Session, request: TurnRequest, bounds: turns.Bounds) -> dict[str, Any]:
        """One prompt in this session. After an error the session, which may hold half a turn, is given up."""
        session.prompts += 1
        message = f"msg_{hashlib.sha256(f'{session.id}/{session.prompts}'.encode()).hexdigest()[:24]}"
        progress = self._events.watch(session.id)
        try:
            answer = await turns.ask(
                self._client, progress, session.id, message=message, request=request, bounds=bounds
            )
            reply = await self._reply(session, answer, progress)
        except SisuError as e:
            log.warning("opencode_turn_failed", extra={"session": session.id, "error": f"{type(e).__name__}: {e}"})
            if not isinstance(e, TurnStalled):  # that one was reverted, and the session is as it was before
                await self._end(request.session)
            e.tokens = progress.tokens  # here: what ended the turn may have come before the count of its last step
            raise
        finally:
            self._events.forget(session.id)
        session.sent = (*session.sent, request.prompt)
        return reply

    async def _reachable(self) -> None:
        """Wait for the daemon, which may be starting. Raises Unavailable after DAEMON_SECONDS, Permanent for another version."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._events.run())
        until = time.monotonic() + self._daemon_seconds
        while not self._events.connected.is_set():
            if isinstance(self._events.failure, Permanent):
                raise Permanent(str(self._events.failure))
            if time.monotonic() > until:
                raise Unavailable(str(self._events.failure or f"OpenCode at {self._client.base_url} sends no events"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._events.connected.wait(), LOOK_SECONDS)

    async def _greet(self) -> None:
        """Before every connection: only the pinned version is used. What another connection knew may be gone with its daemon."""
        found = await self._client.version()
        if found != self._version:
            raise Permanent(f"OpenCode at {self._client.base_url} is {found}, but {self._version} is pinned")
        self._left |= {session.id for session in self._sessions.values()}
        self._sessions.clear()
        await self._sweep()

    async def _sweep(self) -> None:
        """Sessions that we could not end, and those that a killed worker left, once they are older than any turn."""
        old = (time.time() - 2 * self._turn_seconds) * 1000
        for one in await self._client.sessions():
            ours = str(one.get("title", "")).startswith(TITLE)
            if ours and (one["id"] in self._left or one["time"]["updated"] < old):
                await self._client.abort(one["id"])
                await self._client.delete(one["id"])
        self._left.clear()

    async def _end(self, session: str) -> None:
        known = self._sessions.pop(session, None)
        if known is None:
            return
        self._left.add(known.id)
        if not self._events.connected.is_set():
            return  # swept as soon as the daemon is there again
        try:
            await self._client.abort(known.id)
            await self._client.delete(known.id)
            self._left.discard(known.id)
        except SisuError as e:
            log.warning("opencode_session_not_deleted", extra={"session": known.id, "error": str(e)})

    async def _session(self, request: TurnRequest) -> _Session:
        """The daemon's session in which exactly request.history was said; a new one is told that history first."""
        known = self._sessions.get(request.session)
        if known is not None and known.sent == request.history:
            return known
        await self._end(request.session)
        session = _Session(await self._client.create_session(title=f"{TITLE} {request.agent}", agent=request.agent))
        self._sessions[request.session] = session
        for text in request.history:
            await self._client.remind(session.id, agent=request.agent, text=text)
        session.sent = request.history
        return session

    async def _reply(self, session: _Session, answer: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        info, parts = answer.get("info") or {}, answer.get("parts") or []
        structured = info.get("structured")
        # Not the stream's count, which may be a moment behind the answer. The session's holds no turn that was reverted.
        before, session.counted = session.counted, await self._client.tokens(session.id)
        self._events.forget(session.id)
        progress.tokens = (session.counted[0] - before[0], session.counted[1] - before[1])
        problem = turns.judge(info) if structured is None else None
        return {
            "structured": structured,
            "problem": problem,
            "raw_text": "".join(part.get("text", "") for part in parts if part.get("type") == "text"),
            "tool_calls": tuple(_tool_call(part, structured) for part in parts if part.get("type") == "tool"),
            "tokens_in": progress.tokens[0],
            "tokens_out": progress.tokens[1],
        }


async def _unless(canceled: Callable[[], bool], work: Coroutine[Any, Any, T]) -> T:
    """What it waits for. Raises Permanent within a second when it is canceled first."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)
            if not task.done() and canceled():
                raise Permanent("canceled before there was a plan")
        return task.result()
    finally:
        task.cancel()


def _tool_call(part: Mapping[str, Any], structured: Any) -> dict[str, Any]:
    """A tool part without ids and times. The structured answer is not repeated."""
    state = part.get("state") or {}
    call = {"tool": part.get("tool"), "status": state.get("status")}
    return call if state.get("input") == structured else {**call, "input": state.get("input")}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
