"""How often an Intent's status is written: news at once, progress once a second, what passes in a moment not at all."""

from __future__ import annotations

from controller.ports import Clock

PROGRESS_SECONDS = 1.0
MOMENT_SECONDS = 0.25
REMEMBERED = 10_000


class Pace:
    """Remembers when each Intent was written last; forgets the oldest beyond a bound."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}

    def wait(self, uid: str, *, news: bool, running: bool) -> float:
        """Seconds until this write is due; 0 for now."""
        if running:
            return MOMENT_SECONDS
        if news or uid not in self._last:
            return 0.0
        return max(0.0, self._last[uid] + PROGRESS_SECONDS - self._clock.monotonic())

    def wrote(self, uid: str) -> None:
        """A write was made."""
        self._last.pop(uid, None)
        self._last[uid] = self._clock.monotonic()
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
