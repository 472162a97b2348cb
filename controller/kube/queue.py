"""A deduplicating work queue: one key is worked on by one worker at a time, errors come back with exponential delay.

Two lanes: what somebody waits for comes before what can wait (new Intents, a look at everything). Under load that bounds the work in
progress, so that what has begun is told in time. Few workers at once serve the second lane: what a new Intent sets in motion comes back
seconds later, and must find room. One in `SHARE` turns is the second lane's first, so that nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from controller.core.errors import Conflict, Unavailable

log = logging.getLogger(__name__)
FIRST_DELAY, MAX_DELAY = 0.1, 30.0
SHARE = 16
FEW = 8  # one in so many workers


class WorkQueue:
    """Keys in; `handle(key)` out. A key added while it is being handled is handled once more. Single event loop."""

    def __init__(self, handle: Callable[[str], Awaitable[None]], *, workers: int) -> None:
        self._handle = handle
        self._workers = workers
        self._urgent: dict[str, None] = {}
        self._patient: dict[str, None] = {}
        self._turn = 0
        self._few = max(1, workers // FEW)
        self._patiently: set[str] = set()  # of those that are busy
        self._busy: set[str] = set()
        self._delays: dict[str, float] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self.errors = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._patient) + len(self._busy)

    def add(self, key: str, *, urgent: bool = True) -> None:
        """Something about this key changed. One that waits urgently stays urgent."""
        if urgent:
            self._patient.pop(key, None)
            self._urgent[key] = None
        elif key not in self._urgent:
            self._patient[key] = None
        self._wake.set()

    def add_later(self, key: str, seconds: float) -> None:
        """Look again then, unless somebody looks sooner: that look knows by itself whether another is due."""
        loop = asyncio.get_running_loop()
        before = self._later.get(key)
        if before is None or loop.time() + seconds < before.when():
            self._cancel_later(key)
            self._later[key] = loop.call_later(seconds, self.add, key)

    def _cancel_later(self, key: str) -> None:
        timer = self._later.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def _next(self) -> str:
        while True:
            self._turn += 1
            patient = self._patient if len(self._patiently) < self._few else {}
            for lane in (patient, self._urgent) if self._turn % SHARE == 0 else (self._urgent, patient):
                for key in lane:
                    if key not in self._busy:
                        del lane[key]
                        self._busy.add(key)
                        self._cancel_later(key)
                        if lane is self._patient:
                            self._patiently.add(key)
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
                self._patiently.discard(key)
                self._wake.set()

    def _failed(self, key: str, error: Exception) -> None:
        self.errors += 1
        delay = self._delays[key] = min(self._delays.get(key, FIRST_DELAY / 2) * 2, MAX_DELAY)
        self.add_later(key, delay)
        if isinstance(error, RecursionError):
            log.error("reconcile failed", extra={"uid": key, "again_in": delay, "error": "nested too deep"})
        elif isinstance(error, Conflict):
            log.debug("reconcile conflict", extra={"uid": key, "error": str(error)})
        elif isinstance(error, Unavailable):  # said once per Intent and try while a server is away: no traceback, too
            log.warning("reconcile failed", extra={"uid": key, "again_in": delay, "error": str(error)})
        else:
            log.warning("reconcile failed", extra={"uid": key, "again_in": delay}, exc_info=error)
