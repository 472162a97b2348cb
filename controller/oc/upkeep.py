"""When the OpenCode daemon is started, restarted or refused: a pure function of what was seen, by a clock that is passed in.

supervise.py looks, asks `decide`, and acts. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How patient to be. The defaults were measured: 3 s to a healthy daemon (30 s on a busy machine), 3 s for a busy one's answer."""

    start: float = 120.0  # until the first healthy answer
    start_probe: float = 0.8  # a request that arrives just as the port is bound is never answered: ask again soon
    start_pause: float = 0.1
    probe: float = 4.0
    pause: float = 1.0
    wedged: float = 15.0  # without a healthy answer, and at least `misses` probes in a row
    misses: int = 3  # so that a supervisor that was itself held up does not blame the daemon
    stop: float = 5.0  # from SIGTERM to SIGKILL
    backoff: float = 1.0  # doubles with each failure
    backoff_most: float = 30.0
    steady: float = 60.0  # who lived that long begins with the first backoff again
    memory_mb: int = 1536
    never_idle: float = 600.0  # above the limit for so long without a pause between turns: restart anyway

    @property
    def replaced(self) -> float:
        """At most so long after its last healthy answer, a daemon that had lived is gone and the next one is started."""
        return self.wedged + self.probe + self.pause + self.stop + self.backoff


class Reason(enum.StrEnum):
    """Why the daemon is restarted. docs/operations.md says what to do about each."""

    CRASHED = "crashed"
    NOT_STARTED = "not_started"
    WEDGED = "wedged"
    MEMORY = "memory"
    MEMORY_BUSY = "memory_busy"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look. `version` comes with a healthy answer; `idle` is known only where it was asked for."""

    exit: int | None = None
    version: str | None = None
    rss_mb: int = 0
    idle: bool | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """What is remembered between two looks. `launched` is None while none runs."""

    launched: float | None = None
    healthy: float | None = None
    misses: int = 0
    heavy: float | None = None
    failures: int = 0
    retry_at: float = 0.0

    @property
    def starting(self) -> bool:
        """It runs and has not been healthy yet."""
        return self.launched is not None and self.healthy is None


@dataclass(frozen=True)
class Wait:
    """Look again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Launch:
    """Start a daemon."""


@dataclass(frozen=True)
class Restart:
    """End it; the next one is started after so many seconds."""

    reason: Reason
    seconds: float


@dataclass(frozen=True)
class Refuse:
    """End it and give up: starting it again would not help."""

    message: str


Action = Wait | Launch | Restart | Refuse


def decide(state: State, seen: Seen, now: float, *, bounds: Bounds, version: str) -> tuple[State, Action]:
    """What is remembered from now on, and what is to be done. `version` is the pinned one."""
    if state.launched is None:
        if now < state.retry_at:
            return state, Wait(min(bounds.pause, state.retry_at - now))
        return replace(state, launched=now), Launch()
    if seen.exit is not None:
        return _restart(state, Reason.CRASHED, now, bounds)
    if seen.version is None:
        return _silent(replace(state, misses=state.misses + 1), now, bounds)
    if seen.version != version:
        return state, Refuse(f"OC_BINARY is OpenCode {seen.version}, but {version} is pinned")
    return _weighed(replace(state, healthy=now, misses=0), seen, now, bounds)


def _silent(state: State, now: float, bounds: Bounds) -> tuple[State, Action]:
    """No healthy answer to this probe."""
    assert state.launched is not None
    if state.healthy is None:
        if now - state.launched >= bounds.start:
            return _restart(state, Reason.NOT_STARTED, now, bounds)
        return state, Wait(bounds.start_pause)
    if now - state.healthy >= bounds.wedged and state.misses >= bounds.misses:
        return _restart(state, Reason.WEDGED, now, bounds)
    return state, Wait(bounds.pause)


def _weighed(state: State, seen: Seen, now: float, bounds: Bounds) -> tuple[State, Action]:
    """Healthy; is it too big?"""
    if seen.rss_mb <= bounds.memory_mb:
        return replace(state, heavy=None), Wait(bounds.pause)
    state = replace(state, heavy=now if state.heavy is None else state.heavy)
    assert state.heavy is not None
    if seen.idle:
        return _restart(state, Reason.MEMORY, now, bounds)
    if now - state.heavy >= bounds.never_idle:
        return _restart(state, Reason.MEMORY_BUSY, now, bounds)
    return state, Wait(bounds.pause)


def _restart(state: State, reason: Reason, now: float, bounds: Bounds) -> tuple[State, Action]:
    assert state.launched is not None
    steady = state.healthy is not None and now - state.launched >= bounds.steady
    failures = 0 if steady else state.failures
    delay = min(bounds.backoff_most, bounds.backoff * 2.0 ** min(failures, 16))
    return State(failures=failures + 1, retry_at=now + delay), Restart(reason, delay)
