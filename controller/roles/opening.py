"""A worker begins only after a controller has compared this database with the mark outside it, later than this process began (law 10).

So a backup that was restored while everything was stopped is noticed before any of its work is taken up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from controller.core.errors import Unavailable
from controller.db import marks
from controller.db.pool import Pool
from controller.roles.fence import fence_off
from controller.roles.worker import Worker

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.05


class Opening:
    """Makes and starts the worker in a thread of its own: no event loop runs there, which DBOS would adopt."""

    def __init__(self, pool: Pool, make: Callable[[], Worker]) -> None:
        self._pool, self._make = pool, make
        self._since = marks.clock(pool)
        self._stop = threading.Event()
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._run, name="opening", daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._thread.start()

    def ready(self) -> str | None:
        """Why nothing is executed yet."""
        return None if self._worker is not None else "the worker waits until a controller has compared the store"

    def stop(self) -> None:
        """End the worker, or the waiting."""
        self._stop.set()
        self._thread.join(5)
        if self._worker is not None:
            self._worker.stop()

    def _run(self) -> None:
        try:
            while not self._stop.wait(LOOK_SECONDS):
                if self._compared():
                    worker = self._make()
                    worker.start()
                    self._worker = worker
                    return
        except Exception as e:  # a process whose worker cannot begin must not look alive
            log.exception("worker not started")
            fence_off(f"the worker could not be started: {e}")

    def _compared(self) -> bool:
        try:
            return marks.compared_since(self._pool, self._since)
        except Unavailable:
            return False
