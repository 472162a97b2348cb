"""A deduplicating work queue: one key is worked on by one worker at a time, errors come back with exponential delay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from controller.core.errors import Conflict

log = logging.getLogger(__name__)
FIRST_DELAY, MAX_DELAY = 0.1, 30.0


class WorkQueue:
    """Keys in; `handle(key)` out. A key added while it is being handled is handled once more. Single event loop."""

    def __init__(self, handle: Callable[[str], Awaitable[None]], *, workers: int) -> None:
        self._handle = handle
        self._workers = workers
        self._dirty: dict[str, None] = {}
        self._busy: set[str] = set()
        self._delays: dict[str, float] = {}
        self._wake = asyncio.Event()
        self.errors = 0

    def __len__(self) -> int:
        return len(self._dirty) + len(self._busy)

    def add(self, key: str) -> None:
        """Something about this key changed."""
        self._dirty[key] = None
        self._wake.set()

    def add_later(self, key: str, seconds: float) -> None:
        """Look again then."""
        asyncio.get_running_loop().call_later(seconds, self.add, key)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def _next(self) -> str:
        while True:
            for key in self._dirty:
                if key not in self._busy:
                    del self._dirty[key]
                    self._busy.add(key)
                    return key
            self._wake.clear()
            await self._wake.wait()

    async def _work(self) -> None:
        while True:
            key = await self._next()
            try:
                await self._handle(key)
                self._delays.pop(key, None)
            except Exception as e:  # noqa: BLE001 - nothing may end a worker; the key comes back
                self._failed(key, e)
            finally:
                self._busy.discard(key)
                self._wake.set()

    def _failed(self, key: str, error: Exception) -> None:
        self.errors += 1
        delay = self._delays[key] = min(self._delays.get(key, FIRST_DELAY / 2) * 2, MAX_DELAY)
        self.add_later(key, delay)
        if isinstance(error, RecursionError):
            log.error("reconcile failed", extra={"uid": key, "again_in": delay, "error": "nested too deep"})
        elif isinstance(error, Conflict):
            log.debug("reconcile conflict", extra={"uid": key, "error": str(error)})
        else:
            log.warning("reconcile failed", extra={"uid": key, "again_in": delay}, exc_info=error)
