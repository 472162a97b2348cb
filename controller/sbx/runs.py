"""The runs of a provider that works on a loop of its own: the loop puts output into a queue, the caller's thread passes it on and
asks whether to stop. What such providers have in common around a run is here: refusing, checking uploads, measuring, answering.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from controller.core.contract import ErrCode, Metrics, SBXReq, SBXRes
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact, Chunk, Owner
from controller.sbx import result
from controller.sbx.loop import Job, JobCanceled, Loop
from controller.sbx.output import Capture
from controller.sbx.task import Verdict
from controller.sbx.uploads import Verifier

TICK = 0.1  # seconds between two looks when nothing is printed
ASK = 0.5  # seconds between two questions whether the task is canceled
NOTE = "note"
OVER = "over"
M = TypeVar("M")
Attempted: TypeAlias = tuple[Verdict, list[Artifact]]


@dataclass(kw_only=True, eq=False)
class Run(Generic[M]):
    """`made_of` is what the provider makes its sandbox from. `killed` is set by kill(); `ref` when there is a sandbox."""

    request: SBXReq
    owner: Owner
    files: Mapping[str, bytes]
    capture: Capture
    limit: int
    made_of: M
    ref: str
    killed: bool = False
    cpu_ms: int | None = None
    mem_peak_mb: int | None = None
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


class Runs(Generic[M]):
    """All of one provider, by owner. `observe` is told how long each stage took."""

    def __init__(self, provider: str, *, loop: Loop, output_limit: int, observe: Callable[[str, float], None]) -> None:
        self._provider, self._loop, self._output_limit, self._observe = provider, loop, output_limit, observe
        self._verifier = Verifier()
        self._by_owner: dict[tuple[str, int], Run[M]] = {}
        self._lock = threading.Lock()

    def conduct(
        self,
        request: SBXReq,
        *,
        owner: Owner,
        files: Mapping[str, bytes],
        emit: Callable[[Chunk], None],
        canceled: Callable[[], bool],
        check: Callable[[SBXReq], M],
        attempt: Callable[[Run[M]], Coroutine[Any, Any, Attempted]],
    ) -> tuple[SBXRes, Sequence[Artifact]]:
        """ports.SandboxProvider.run: `check` raises InvalidIntent, `attempt` is one sandbox from making to killing, on the loop."""
        started = time.monotonic()
        capture = Capture(emit, limit=self._output_limit)
        ref, found = f"{self._provider}:", list[Artifact]()
        cpu_ms = mem_peak_mb = None
        try:
            made_of = check(request)
        except InvalidIntent as e:
            verdict = Verdict(code=ErrCode.BOOT_FAIL, note=str(e))
        else:
            if complaint := self._verifier.complaint(request, files):
                verdict = Verdict(code=ErrCode.UPLOAD_FAIL, note=complaint)
            else:
                run = Run(
                    request=request,
                    owner=owner,
                    files=files,
                    capture=capture,
                    limit=self._output_limit,
                    made_of=made_of,
                    ref=ref,
                )
                verdict, found = self._watched(run, attempt, canceled)
                ref, cpu_ms, mem_peak_mb = run.ref, run.cpu_ms, run.mem_peak_mb
        wall = time.monotonic() - started
        self._observe("total", wall)
        metrics = Metrics(wall_ms=round(wall * 1000), cpu_ms=cpu_ms, mem_peak_mb=mem_peak_mb)
        return result.response(verdict, found, capture=capture, metrics=metrics, ref=ref, owner=owner), found

    def killing(self, owner: Owner) -> Run[M] | None:
        """Our run of this owner, which is marked: should its sandbox be in the making, it ends when it is made."""
        with self._lock:
            if run := self._by_owner.get((owner.store_id, owner.fence)):
                run.killed = True
        return run

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Tells how long this took, unless it raises."""
        started = time.monotonic()
        yield
        self.took(stage, time.monotonic() - started)

    def took(self, stage: str, seconds: float) -> None:
        """Tells `observe`."""
        self._observe(stage, seconds)

    def _watched(
        self, run: Run[M], attempt: Callable[[Run[M]], Coroutine[Any, Any, Attempted]], canceled: Callable[[], bool]
    ) -> Attempted:
        """In the caller's thread: passes output on and asks whether to stop, until the job is over."""
        key = (run.owner.store_id, run.owner.fence)
        with self._lock:
            self._by_owner[key] = run
        job = self._loop.start(attempt(run))
        try:
            run.follow(job, canceled)
            verdict, found = job.result()
        except JobCanceled:
            return Verdict(code=ErrCode.CANCELED, note="ended: canceled"), []
        finally:
            if not job.done():  # the caller's own callbacks failed
                job.cancel()
                with contextlib.suppress(Exception):
                    job.result()
            with self._lock:
                del self._by_owner[key]
        if run.killed and verdict.code.retryable:
            return Verdict(code=ErrCode.LOST, note="killed by its fence"), []
        return verdict, found
