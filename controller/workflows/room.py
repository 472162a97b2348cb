"""Which attempts are in their sandboxes in this process. One that may have killed its workers gets the process for itself (ADR 0015)."""

from __future__ import annotations

import threading


class Room:
    """Attempts by fence. Whoever wants to be alone keeps newcomers out until the others have left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self._alone: set[int] = set()

    def enter(self, fence: int, *, alone: bool) -> bool:
        """False: not yet. Ask again until it is True, or leave."""
        with self._lock:
            if alone:
                self._alone.add(fence)
            free = not (self._inside if alone else self._alone)
            if free:
                self._inside.add(fence)
            return free

    def leave(self, fence: int) -> None:
        """Also of one that never came in."""
        with self._lock:
            self._inside.discard(fence)
            self._alone.discard(fence)
