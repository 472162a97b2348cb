"""Starts, watches and ends processes, and knows them again later by more than their number.

A process is known by pid, boot and start time, and signalled through a pidfd, so that a number which the
system gave to somebody else meanwhile is never signalled. Linux only, as is the rest of this package.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import DevclusterError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
PORT_TAKEN = "address already in use"


class PortLost(DevclusterError):
    """Another process took the port between our looking and our listening; try again with another."""


@dataclass(frozen=True)
class Account:
    """Whom a process runs as."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Child:
    """A process that we started. `born` is boot and start time; with `pid` it names one process for ever."""

    name: str
    pid: int
    born: str
    popen: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        if self.popen is not None:
            return self.popen.poll() is None
        return _born(self.pid) == self.born

    def wait(self, timeout: float) -> bool:
        """True when it has ended within `timeout` seconds."""
        if self.popen is not None:
            try:
                self.popen.wait(timeout)
            except subprocess.TimeoutExpired:
                return False
            return True
        fd = self._pidfd()
        if fd is None:
            return True
        try:
            return bool(select.select([fd], [], [], timeout)[0])
        finally:
            os.close(fd)

    def stop(self, *steps: tuple[signal.Signals, float]) -> None:
        """Sends each signal in turn and waits so many seconds for the end, then SIGKILL."""
        for number, grace in (*steps, (signal.SIGKILL, 10.0)):
            self.signal(number)
            if self.wait(grace):
                return
        raise DevclusterError(f"{self.name} (pid {self.pid}) is still there after SIGKILL")

    def signal(self, number: signal.Signals) -> None:
        """Sends it to this very process; nothing happens when it is gone."""
        fd = self._pidfd()
        if fd is None:
            return
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return
        finally:
            os.close(fd)

    def record(self) -> dict[str, str | int]:
        return {"name": self.name, "pid": self.pid, "born": self.born}

    @classmethod
    def from_record(cls, record: Mapping[str, str | int]) -> Child:
        return cls(name=str(record["name"]), pid=int(record["pid"]), born=str(record["born"]))

    def _pidfd(self) -> int | None:
        """A handle on this very process, or None when it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if _born(self.pid) == self.born:
            return fd
        os.close(fd)
        return None


def spawn(
    name: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    detach: bool,
    cwd: Path,
    account: Account | None = None,
    death: signal.Signals = signal.SIGKILL,
    env: Mapping[str, str] | None = None,
) -> Child:
    """Starts `command` in a session of its own, output appended to `log`.

    Unless `detach`, the kernel sends it `death` when the calling *thread* ends, so start from the main thread.
    """
    with log.open("ab") as out:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            # Runs after the change of user, which would clear the setting.
            preexec_fn=None if detach else _dies_with(os.getpid(), death),
        )
    return Child(name=name, pid=popen.pid, born=_born(popen.pid) or "gone", popen=popen)


def this_process(name: str) -> Child:
    """The process that calls this, for a record that others read."""
    return Child(name=name, pid=os.getpid(), born=_born(os.getpid()) or "gone")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago. Whoever uses them must retry on `PortLost`."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_ready(child: Child, ready: Callable[[], bool], *, log: Path, timeout: float) -> None:
    """Polls `ready` until it is true. Raises `PortLost` or `DevclusterError` with the end of the log."""
    deadline = time.monotonic() + timeout
    while not ready():
        if not child.alive():
            end = tail(log)
            if PORT_TAKEN in end.lower():
                raise PortLost(f"{child.name}: {PORT_TAKEN}")
            raise DevclusterError(f"{child.name} ended while starting; the end of {log}:\n{end}")
        if time.monotonic() > deadline:
            raise DevclusterError(f"{child.name} was not ready after {timeout:.0f} s; the end of {log}:\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, each cut to a readable length."""
    return "\n".join(line[:400] for line in log.read_text(errors="replace").splitlines()[-lines:])


def _dies_with(parent: int, number: signal.Signals) -> Callable[[], None]:
    def setup() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it died before the setting took hold
            os._exit(1)

    return setup


def _born(pid: int) -> str | None:
    """Boot id and start time of a process, or None when it is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything; the fields after it are state (3) … starttime (22).
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
