"""Processes of other people's making, killed safely: by pidfd, after their start time was compared.

A pid alone may have been given to somebody else by the time it is used.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

GONE_WITHIN = 5.0  # seconds; a killed PID namespace takes milliseconds


@dataclass(frozen=True, kw_only=True)
class Process:
    """`start` is field 22 of /proc/<pid>/stat with the boot it counts from."""

    pid: int
    start: str


def identify(pid: int) -> Process | None:
    """None when there is no such process, or it is a zombie."""
    try:
        # The name in field 2 may hold anything, also blanks and parentheses: count from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else Process(pid=pid, start=f"{boot}:{fields[19]}")


def lives(process: Process) -> bool:
    """Whether this very process still runs."""
    return identify(process.pid) == process


def kill(process: Process) -> bool:
    """SIGKILL and wait until it is gone. For a namespace's init that means: until everything in it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not lives(process):
            return False
        kill_and_wait(fd)
        return True
    finally:
        os.close(fd)


def kill_and_wait(pidfd: int) -> None:
    """The same by an open pidfd, which cannot name somebody else."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(GONE_WITHIN * 1000)
