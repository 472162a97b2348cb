"""The product of scripted_main.py, in which a task whose command says KILLS takes its worker down half a second after its start.

`python -m tests.support.killer_main FILE`, as scripted_main.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from controller.core.contract import SBXReq
from tests.support import scripted_main

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


if __name__ == "__main__":
    sys.exit(scripted_main.run(Killing))
