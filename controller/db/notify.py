"""LISTEN: which Intents' runs changed. A lost connection is made again, and then everything may have changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import psycopg

from controller.db.pool import noticing

log = logging.getLogger(__name__)
CHANNEL = "sisukodo_runs"


class Listener:
    """Calls `notify(intent_id)` per change, and `notify(None)` whenever some may have been missed; in its own thread."""

    def __init__(self, url: str, notify: Callable[[str | None], None]) -> None:
        self._url, self._notify = url, notify
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listen", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, at most a second later."""
        self._stop.set()
        self._thread.join(3)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(noticing(self._url), autocommit=True, application_name="sisu-kodo-listen") as c:
                    c.execute(f"LISTEN {CHANNEL}")
                    self._notify(None)
                    while not self._stop.is_set():
                        for note in c.notifies(timeout=1.0):
                            self._notify(note.payload)
            except psycopg.Error as e:
                log.warning("listen connection lost", extra={"error": type(e).__name__})
                self._stop.wait(1.0)
