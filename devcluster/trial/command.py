"""How a command of this kind begins and ends: a stack of its own, the machine's facts, what happens on Ctrl-C and on failure."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import typer

from devcluster.errors import DevclusterError
from devcluster.stack import Stack
from devcluster.trial.progress import elapsed, say


@contextmanager
def command(name: str) -> Iterator[dict[str, str]]:
    """The facts, which are the title of what is shown and may grow. Exit 130 after SIGINT or SIGTERM, 1 after a DevclusterError."""
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        yield {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **_machine(), "load before": _load()}
    except KeyboardInterrupt:
        say("interrupted; everything that was started is stopped")
        raise typer.Exit(130) from None
    except DevclusterError as e:
        say(f"{name}: {e}")
        raise typer.Exit(1) from e


def after() -> dict[str, str]:
    """The facts of the end."""
    return {"load after": _load(), "took": f"{elapsed():.0f} s"}


def titled(facts: dict[str, str]) -> str:
    """The facts as one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@contextmanager
def own_stack(**more: Any) -> Iterator[Stack]:
    """A stack in a temporary directory, fsync on, with `more` of Stack's fields; both are gone afterwards."""
    state = Path(tempfile.mkdtemp(prefix="sisu-kodo-trial-"))
    stack = Stack(state, fsync=True, **more)
    try:
        with stack:
            yield stack
    finally:
        if stack.postgres is not None and not stack.postgres.running:
            stack.postgres.wipe()
        shutil.rmtree(state, ignore_errors=True)


def _machine() -> dict[str, str]:
    return {
        "CPUs": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Python": sys.version.split()[0],
    }


def _load() -> str:
    return " ".join(f"{x:.1f}" for x in os.getloadavg())
