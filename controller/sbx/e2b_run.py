"""One run as its caller sees it: the loop's thread puts output into a queue, the caller's thread passes it on and asks whether to stop."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.core.contract import SBXReq
from controller.core.model import Owner
from controller.sbx.e2b_calls import Job
from controller.sbx.output import Capture

TICK = 0.1  # seconds between two looks when nothing is printed
ASK = 0.5  # seconds between two questions whether the task is canceled
NOTE = "note"
OVER = "over"


@dataclass(kw_only=True, eq=False)
class Run:
    """`killed` is set by kill(); `ref` when there is a box."""

    request: SBXReq
    owner: Owner
    files: Mapping[str, bytes]
    capture: Capture
    limit: int
    template: str
    build: str
    killed: bool = False
    ref: str = "e2b:"
    _said: queue.SimpleQueue[tuple[str, bytes]] = field(default_factory=queue.SimpleQueue)
    _sizes: dict[str, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})

    def say(self, kind: str, data: bytes) -> None:
        """Called on the loop. `kind` is stdout, stderr or note; output beyond what will be cut anyway is dropped here."""
        if kind != NOTE:
            if self._sizes[kind] > self.limit:
                return
            self._sizes[kind] += len(data)
        self._said.put((kind, data))

    def note(self, text: str) -> None:
        """Called on the loop: a line of ours."""
        self.say(NOTE, text.encode(errors="replace"))

    def follow(self, job: Job[Any], canceled: Callable[[], bool]) -> None:
        """Called in the caller's thread: returns when the job is over and all that it said was passed on."""
        job.when_over(lambda: self._said.put((OVER, b"")))
        asked, stopped = 0.0, False
        while True:
            try:
                kind, data = self._said.get(timeout=TICK)
            except queue.Empty:
                kind, data = "", b""
            if kind == OVER:
                return
            if kind == NOTE:
                self.capture.note(data.decode())
            elif kind:
                self.capture.feed(kind, data)
            if not stopped and time.monotonic() - asked >= ASK:
                asked = time.monotonic()
                if stopped := canceled():
                    job.cancel()
