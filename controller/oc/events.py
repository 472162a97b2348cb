"""What the daemon says while a turn runs: retries, tool calls, steps, tokens. One stream for all sessions of one daemon.

The stream has no replay: after every connection the sessions' states are asked for once, so that a retry is never missed for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.core.errors import SisuError, Unavailable
from controller.oc.client import OpenCodeClient, counted

ANSWER_TOOL = "StructuredOutput"
PAUSE_SECONDS = 0.5


@dataclass
class Progress:
    """One turn so far. `retry` is the daemon's own try again: {attempt, message, next: epoch in ms}; `foreign` are tools that
    the agent has not; `tokens` are those in and out that were reported; `lost` says why nothing more is heard of it."""

    retry: Mapping[str, Any] | None = None
    foreign: list[str] = field(default_factory=list)
    steps: int = 0
    tokens: tuple[int, int] = (0, 0)
    lost: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Events:
    """`run()` as a task; `watch()` before a prompt, `forget()` after it.

    `greet` comes before every connection: what it raises keeps the daemon from being used. `failure` is why there is none now.
    """

    def __init__(self, client: OpenCodeClient, *, greet: Callable[[], Awaitable[None]]) -> None:
        self._client, self._greet = client, greet
        self._turns: dict[str, Progress] = {}
        self.connected = asyncio.Event()
        self.failure: SisuError | None = None

    def watch(self, session: str) -> Progress:
        """What happens to this session from now on."""
        self._turns[session] = Progress()
        return self._turns[session]

    def forget(self, session: str) -> None:
        """No longer of interest."""
        self._turns.pop(session, None)

    async def run(self) -> None:
        """Read for ever. A daemon that falls silent or goes away ends the turns that run in it."""
        while True:
            self.failure = None
            try:
                # A request that arrives just as the daemon's port is bound is never answered: let a short one find out.
                await self._greet()
                async for event in self._client.events():
                    if not self.connected.is_set():
                        self.connected.set()
                        await self._catch_up()
                    self._take(str(event.get("type")), event.get("properties") or {})
                self.failure = Unavailable("the daemon closed the stream of events")
            except SisuError as e:
                self.failure = e
            except Exception as e:  # noqa: BLE001 - deaf, but connected, no turn would be ended in time any more
                self.failure = Unavailable(f"an event of the daemon cannot be read: {type(e).__name__}: {str(e)[:200]}")
            self.connected.clear()
            for turn in self._turns.values():
                turn.lost = str(self.failure)
                turn.changed.set()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _catch_up(self) -> None:
        for session, status in (await self._client.status()).items():
            self._take("session.status", {"sessionID": session, "status": status})

    def _take(self, kind: str, properties: Mapping[str, Any]) -> None:
        part = properties.get("part") or {}
        turn = self._turns.get(str(properties.get("sessionID") or part.get("sessionID")))
        if turn is None:
            return
        if kind == "session.status":
            status = properties.get("status") or {}
            turn.retry = status if status.get("type") == "retry" else None
        elif kind == "message.part.updated" and part.get("type") == "tool" and part.get("tool") != ANSWER_TOOL:
            turn.foreign.append(str(part.get("tool")))
        elif kind == "message.part.updated" and part.get("type") == "step-finish":
            turn.steps += 1
            more = counted(part.get("tokens") or {})
            turn.tokens = (turn.tokens[0] + more[0], turn.tokens[1] + more[1])
        else:
            return
        turn.changed.set()
