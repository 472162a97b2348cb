"""Kills what the product stands on, and starts it again where it was. The main thread must call: children end with it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.processes import spawn
from devcluster.stack import Stack
from devcluster.trial.api import RESOURCES

READY_SECONDS = 60.0
LIST = f"{RESOURCES}/intents?limit=1"


def restart_api_server(stack: Stack, *, down: float = 0.0) -> float:
    """SIGKILL, `down` seconds, the same command again, until it lists Intents; how many seconds it did not.

    Not /readyz: on a busy machine it says no for half a minute while requests are served.
    """
    children = stack.cluster._children  # noqa: SLF001 - the new process takes the old one's place, so that stop() ends it
    old = children["kube-apiserver"]
    command = [one.decode() for one in Path(f"/proc/{old.pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    began = time.monotonic()
    old.stop()  # no steps: SIGKILL at once
    time.sleep(down)
    log = stack.cluster.logs / "kube-apiserver.log"
    children["kube-apiserver"] = new = spawn(old.name, command, log=log, detach=False, cwd=stack.state)
    while stack.kubectl("get", "--raw", LIST, check=False).returncode != 0:
        if not new.alive() or time.monotonic() - began > READY_SECONDS:
            raise DevclusterError("the API server did not come back")
        time.sleep(0.05)
    return time.monotonic() - began


def restart_postgres(stack: Stack) -> float:
    """Immediate shutdown (what a crash leaves), start with the same data on the same port; how many seconds it did not answer."""
    assert stack.postgres is not None and stack.postgres.child is not None
    began = time.monotonic()
    stack.postgres.child.stop((signal.SIGQUIT, 10.0))
    stack.postgres.start()
    return time.monotonic() - began
