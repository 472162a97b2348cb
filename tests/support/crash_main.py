"""The product, composed by main.build() as always, with one adapter that kills the process at one point, once.

`python -m tests.support.crash_main METHOD before|after NTH MARKER SETTLED`: SIGKILL around the NTH call of that adapter method, unless
MARKER exists. After every accepted outcome the fence is appended to SETTLED: the oracle's second half, outside PostgreSQL.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from kubernetes.aio.client import ApiClient

from controller import config, log, main
from controller.kube.client import KubeCluster


class Crash:
    """Counts calls of one method (`approve`, or `sandboxes.run` where two adapters share a name); kills around the nth."""

    def __init__(self, method: str, when: str, nth: int, marker: Path) -> None:
        self.method, self.when, self._left, self._marker = method, when, nth, marker

    def now(self) -> None:
        if self._marker.exists():
            return
        self._left -= 1
        if self._left == 0:
            self._marker.write_text("crashed\n")
            os.kill(os.getpid(), signal.SIGKILL)


class Around:
    """A proxy of one adapter. Only the named method is special; coroutines are awaited in between."""

    def __init__(self, target: Any, crash: Crash, *, name: str, settled: Path | None = None) -> None:
        self._target, self._crash, self._name, self._settled = target, crash, name, settled

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found
        if name == "record_outcome":
            found = self._settling(found)
        return self._crashing(found) if self._crash.method in (name, f"{self._name}.{name}") else found

    def _crashing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        crash = self._crash

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if crash.when == "before":
                crash.now()
            result = call(*args, **kwargs)
            if hasattr(result, "__await__"):
                return self._awaited(result)
            if crash.when == "after":
                crash.now()
            return result

        return wrapped

    async def _awaited(self, result: Any) -> Any:
        value = await result
        if self._crash.when == "after":
            self._crash.now()
        return value

    def _settling(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(attempt: Any, outcome: Any, **kwargs: Any) -> Any:
            following = call(attempt, outcome, **kwargs)
            if following is not None and self._settled is not None:
                with self._settled.open("a") as f:
                    f.write(f"{attempt.task_key} {attempt.attempt} {attempt.fence}\n")
            return following

        return wrapped


def run() -> int:
    method, when, nth, marker, settled = sys.argv[1:]
    crash = Crash(method, when, int(nth), Path(marker))
    settings = config.load()
    log.configure(as_json=False, level=settings.log_level)
    adapters = main.build(settings, role="all")
    worker = adapters.worker
    assert worker is not None

    def cluster(api: ApiClient) -> KubeCluster:
        return cast("KubeCluster", Around(KubeCluster(api), crash, name="cluster"))

    crashing = replace(
        adapters,
        runs=cast("Any", Around(adapters.runs, crash, name="runs")),
        cluster=cluster,
        worker=replace(
            worker,
            store=cast("Any", Around(worker.store, crash, name="store", settled=Path(settled))),
            sandboxes=cast("Any", Around(worker.sandboxes, crash, name="sandboxes")),
            workspace=cast("Any", Around(worker.workspace, crash, name="workspace")),
        ),
    )
    return main.run(settings, role="all", adapters=crashing)


if __name__ == "__main__":
    sys.exit(run())
