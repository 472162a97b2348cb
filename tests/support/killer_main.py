"""The product of scripted_main.py, in which a task whose command says KILLS takes its worker down half a second after its start.

`python -m tests.support.killer_main FILE`, as scripted_main.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from controller import config, log, main
from controller.core.contract import SBXReq
from tests.support.scripted_main import ByGoal

KILLS = "take the worker down"


class Killing:
    """A SandboxProvider; all is the real one's, but that some tasks kill."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def run(self, request: SBXReq, **kwargs: Any) -> Any:
        if KILLS in request.cmd:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return self._real.run(request, **kwargs)


def run() -> int:
    (file,) = sys.argv[1:]
    settings = config.load()
    log.configure(as_json=False, level=settings.log_level)
    adapters = main.build(settings, role="all")
    assert adapters.worker is not None
    worker = replace(
        adapters.worker,
        agent=cast("Any", ByGoal(answers=json.loads(Path(file).read_text()))),
        sandboxes=cast("Any", Killing(adapters.worker.sandboxes)),
    )
    return main.run(settings, role="all", adapters=replace(adapters, worker=worker))


if __name__ == "__main__":
    sys.exit(run())
