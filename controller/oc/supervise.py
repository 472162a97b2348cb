"""Keeps the OpenCode daemon well: `python -m controller oc-daemon`, in the foreground, beside the worker.

Starts it, looks at it, restarts it as upkeep.py decides, and ends with it. Each start gets a new home: the sessions of the
last one are made again from our ledger, and its database would only grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import httpx

from controller.config import DaemonSettings
from controller.core.errors import Permanent
from controller.oc.client import USER
from controller.oc.daemon import Daemon
from controller.oc.upkeep import Action, Bounds, Launch, Reason, Refuse, Restart, Seen, State, Wait, decide

log = logging.getLogger(__name__)
T = TypeVar("T")

HEALTHY = "healthy"  # this file in OC_STATE is touched at each healthy answer; the chart's probes look at its age
RSS_EVERY = 300.0  # seconds between two log lines about memory


def run(settings: DaemonSettings, *, bounds: Bounds | None = None) -> int:
    """Until SIGTERM or SIGINT: the process's exit code. 1 when the daemon is not the pinned one or cannot be executed."""
    version = settings.version
    bounds = bounds or Bounds(memory_mb=settings.memory_mb)
    daemon = Daemon(
        settings.binary.absolute(),
        root=settings.state / "daemon",  # of its own: forget() removes what is in it
        config=settings.config.absolute(),
        version=version,
        environ=settings.child_environ(),
        port=settings.port,
        password=settings.password,
    )
    return asyncio.run(_until_signal(Supervisor(daemon, version=version, bounds=bounds, root=settings.state)))


async def _until_signal(supervisor: Supervisor) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await supervisor.run(stop)
    except Permanent as e:
        log.critical("opencode refused", extra={"error": str(e)})
        return 1
    return 0


class Supervisor:
    """One daemon, kept well. Everything happens on the main thread: the kernel ends the child with the thread that started it."""

    def __init__(self, daemon: Daemon, *, version: str, bounds: Bounds, root: Path) -> None:
        self._daemon, self._version, self._bounds, self._root = daemon, version, bounds, root
        self._state = State()
        self._said_rss = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; nothing is left running. Raises Permanent when starting it again would not help."""
        self._unhealthy()
        try:
            while not stop.is_set():
                seen = await _unless(stop, self._look())
                if seen is None:
                    break
                before = self._state
                self._state, action = decide(before, seen, time.monotonic(), bounds=self._bounds, version=self._version)
                self._tell(before, seen, action)
                self._act(action)
                if isinstance(action, Wait):
                    await _unless(stop, asyncio.sleep(action.seconds))
        finally:
            code = self._daemon.stop(seconds=self._bounds.stop)
            self._unhealthy()
            log.info("opencode stopped", extra={"exit_code": code})

    def _unhealthy(self) -> None:
        with contextlib.suppress(OSError):  # not there, or not ours to write, which launch() says better
            (self._root / HEALTHY).unlink()

    async def _look(self) -> Seen:
        if self._state.launched is None:
            return Seen()
        if (code := self._daemon.exit_code()) is not None:
            return Seen(exit=code)
        seconds = self._bounds.start_probe if self._state.starting else self._bounds.probe
        health = await self._get("/global/health", seconds)
        version = str(health.get("version")) if isinstance(health, dict) and health.get("healthy") else None
        rss = self._daemon.rss_mb()
        idle = None
        if version is not None and rss > self._bounds.memory_mb:
            idle = await self._get("/session/status", self._bounds.probe) == {}
        return Seen(exit=self._daemon.exit_code(), version=version, rss_mb=rss, idle=idle)

    async def _get(self, path: str, seconds: float) -> object:
        """The answer's JSON, or None. A connection of its own each time: one that hangs must not hide a healthy daemon."""
        with contextlib.suppress(httpx.HTTPError, TimeoutError, ValueError):
            # verify=False: plain HTTP on loopback; it spares reading the CA bundle each second.
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(auth=(USER, self._daemon.password), trust_env=False, verify=False) as http,
            ):
                response = await http.get(self._daemon.base_url + path, timeout=seconds)
                return response.json() if response.status_code == 200 else None
        return None

    def _act(self, action: Action) -> None:
        if isinstance(action, Launch):
            self._daemon.forget()
            self._daemon.launch()
        elif isinstance(action, Restart):
            self._daemon.stop(seconds=self._bounds.stop)
        elif isinstance(action, Refuse):
            raise Permanent(action.message)

    def _tell(self, before: State, seen: Seen, action: Action) -> None:
        """Log lines, and the file that probes look at."""
        now = time.monotonic()
        facts: dict[str, object] = {"rss_mb": seen.rss_mb, "seconds": round(now - (before.launched or now), 1)}
        if isinstance(action, Launch):
            log.info("opencode starting", extra={"port": self._daemon.port, "failures": before.failures})
        elif isinstance(action, Restart):
            self._tell_restart(action, seen, facts)
        elif self._state.misses == 1 and not self._state.starting:
            log.warning("opencode unhealthy", extra=facts)
        elif seen.version is not None and not isinstance(action, Refuse):
            self._tell_healthy(before, facts, now)

    def _tell_restart(self, action: Restart, seen: Seen, facts: dict[str, object]) -> None:
        planned = action.reason is Reason.MEMORY
        more = {"reason": action.reason.value, "exit_code": seen.exit, "next_in": action.seconds}
        log.log(logging.INFO if planned else logging.WARNING, "opencode restarting", extra={**more, **facts})

    def _tell_healthy(self, before: State, facts: dict[str, object], now: float) -> None:
        with contextlib.suppress(OSError):  # no reason to cut off turns: a probe that misses the file says so
            (self._root / HEALTHY).touch()
            self._daemon.shorten_log()
        if before.starting:
            more = {"pid": self._daemon.pid, "version": self._version, "log": str(self._daemon.log)}
            log.info("opencode started", extra={**facts, **more})
            self._said_rss = now
        elif self._state.heavy is not None and before.heavy is None:
            log.warning("opencode over its memory limit", extra={**facts, "limit_mb": self._bounds.memory_mb})
        elif now - self._said_rss >= RSS_EVERY:
            log.info("opencode rss", extra=facts)
            self._said_rss = now


async def _unless(stop: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The result of `work`; None as soon as `stop` is set."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, stopping):
            if one.cancel():
                with contextlib.suppress(asyncio.CancelledError):
                    await one
