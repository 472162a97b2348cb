"""Runs one command in one jail of a box and follows it to its end: output, deadline, stop, death of the whole tree.

A task is several such runs in the same box (unpack, apply, command, collect): a jail costs about 5 ms, and each run begins
with no process of the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from controller.sbx import processes
from controller.sbx.boxes import Box
from controller.sbx.limits import Cgroup
from controller.sbx.spawn import Launcher, read_end, read_pid

READ = 1 << 16
TICK = 0.1  # seconds between two looks at the watch when nothing is printed
BOOT_SECONDS = 30.0


class Stop(Enum):
    """Why a run was ended by us."""

    TIMEOUT = "timeout"
    CANCELED = "canceled"
    KILLED = "killed"
    DISK = "disk"

    @property
    def gentle(self) -> bool:
        """Whether SIGTERM and a moment of grace come first."""
        return self in (Stop.TIMEOUT, Stop.CANCELED)


@dataclass(frozen=True, kw_only=True)
class Result:
    """`exit` is set only when the command ended by itself, `failure` when bubblewrap could not start it; none: it was killed."""

    exit: int | None = None
    stop: Stop | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What all runs of one sandbox share."""

    launcher: Launcher
    bwrap: Path
    box: Box
    cgroup: Cgroup
    uid: int | None
    prefix: Sequence[str]
    grace: float

    def run(
        self,
        command: Sequence[str],
        *,
        view: bytes,
        sink: Sink,
        watch: Callable[[], Stop | None],
        stdin: bytes = b"",
        before: Callable[[], None] = lambda: None,
    ) -> Result:
        """`before` is called once it is certain that the command is about to be started. Raises OSError, Unavailable."""
        with contextlib.ExitStack() as stack:
            with self.box.gate():
                if self.box.killed():
                    return Result(stop=Stop.KILLED)
                before()
                pump = self._start(stack, command, view=view, stdin=stdin, sink=sink)
            return pump.follow(watch, self.grace)

    def _start(
        self, stack: contextlib.ExitStack, command: Sequence[str], *, view: bytes, stdin: bytes, sink: Sink
    ) -> Pump:
        pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, status
        readers, writers = [r for r, _ in pipes], [w for _, w in pipes]
        for fd in readers:
            os.set_blocking(fd, False)
            stack.callback(os.close, fd)
        with contextlib.ExitStack() as theirs:
            for fd in writers:
                theirs.callback(os.close, fd)
            source, args = theirs.enter_context(_memory(stdin)), theirs.enter_context(_memory(view))
            argv = [str(self.bwrap), "--args", "3", "--json-status-fd", "4", "--", *self.prefix, *command]
            fds = [source, writers[0], writers[1], args, writers[2]]
            done = self.launcher.spawn(argv, fds=fds, cgroups=self.cgroup.procs, uid=self.uid)
        stack.callback(os.close, done)
        os.set_blocking(done, False)
        pump = Pump(stdout=readers[0], stderr=readers[1], status=readers[2], done=done, sink=sink)
        stack.callback(pump.destroy)
        pump.boot()
        if (pid := pump.init) is not None and (process := processes.identify(pid)) is not None:
            self.box.enter(process)
        return pump


@dataclass(frozen=True, kw_only=True)
class Sink:
    """Where output goes, and whether a stream is still wanted."""

    feed: Callable[[str, bytes], None]
    full: Callable[[str], bool] = lambda _: False


class Pump:
    """One running jail: its pipes, and its init by pidfd."""

    def __init__(self, *, stdout: int, stderr: int, status: int, done: int, sink: Sink) -> None:
        self._names = {stdout: "stdout", stderr: "stderr", status: "status", done: "done"}
        self._text = {"status": bytearray(), "done": bytearray()}
        self._open = selectors.DefaultSelector()
        for fd in self._names:
            self._open.register(fd, selectors.EVENT_READ)
        self._sink = sink
        self._pidfd: int | None = None
        self._null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        self.init: int | None = None

    def boot(self) -> None:
        """Until bubblewrap has told the pid of its init, or has ended, whatever comes first."""
        deadline = time.monotonic() + BOOT_SECONDS
        while self._closed("done") is False and time.monotonic() < deadline:
            self._read(TICK)
            if (pid := self._said("child-pid")) is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._pidfd = os.pidfd_open(pid)
                    self.init = pid
                return

    def follow(self, watch: Callable[[], Stop | None], grace: float) -> Result:
        """Until bubblewrap's outer process has ended; then nothing of the jail is left."""
        stop: Stop | None = None
        kill_at = float("inf")
        while not self._closed("done"):
            self._read(TICK)
            if stop is None and (stop := watch()) is not None:
                kill_at = time.monotonic() + (grace if stop.gentle and self._terminate() else 0.0)
            if time.monotonic() >= kill_at:
                self._kill()
                kill_at = float("inf")
        self._kill()  # what the command left running in the background
        self._drain()
        end = read_end(bytes(self._text["done"]))
        code = self._said("exit-code")
        if stop is not None:
            return Result(stop=stop)
        if isinstance(end, str):
            return Result(failure=end)
        if end is not None and code is None and os.WIFEXITED(end):
            return Result(failure="bubblewrap could not set the sandbox up")
        return Result(exit=code)

    def destroy(self) -> None:
        """Safe to repeat. Leaves no process behind, also when an exception ended the run."""
        if not self._closed("done"):
            self._kill()
            with contextlib.suppress(OSError):
                self._wait_done()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._open.close()
        os.close(self._null)

    def _closed(self, name: str) -> bool:
        return all(self._names[fd] != name for fd in self._open.get_map() if isinstance(fd, int))

    def _read(self, timeout: float) -> None:
        for key, _ in self._open.select(timeout):
            self._read_one(key.fd)

    def _read_one(self, fd: int) -> bool:
        """False when there is nothing now, or nothing more."""
        name = self._names[fd]
        try:
            if name in ("stdout", "stderr") and self._sink.full(name):
                count = os.splice(fd, self._null, 1 << 20)  # thrown away without a copy through Python
                data = b""
            else:
                data = os.read(fd, READ)
                count = len(data)
        except BlockingIOError:
            return False
        if count == 0:
            self._open.unregister(fd)
            return False
        if name in self._text:
            self._text[name] += data
        elif data:
            self._sink.feed(name, data)
        return True

    def _drain(self) -> None:
        """What is still in the pipes. All writers are dead, so that this ends."""
        for fd in [key.fd for key in self._open.get_map().values()]:
            while self._read_one(fd):
                pass

    def _said(self, key: str) -> int | None:
        for line in bytes(self._text["status"]).splitlines(keepends=True):
            if line.endswith(b"\n") and key in (fact := json.loads(line)):
                return int(fact[key])
        return None

    def _terminate(self) -> bool:
        """SIGTERM to the command's process group, which bubblewrap's --new-session made. False when that is not so yet."""
        if self.init is None or self._pidfd is None:
            return False
        try:
            group = os.getpgid(self.init)
            if group != self.init:
                return False
            os.killpg(group, signal.SIGTERM)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _kill(self) -> None:
        """The init by pidfd; before there is one, bubblewrap's outer process."""
        if self._pidfd is not None:
            processes.kill_and_wait(self._pidfd)
        elif not self._closed("done") and (pid := read_pid(bytes(self._text["done"]))) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _wait_done(self) -> None:
        poll = select.poll()
        (done,) = (fd for fd, name in self._names.items() if name == "done")
        poll.register(done, select.POLLIN)
        deadline = time.monotonic() + processes.GONE_WITHIN
        while not self._closed("done") and time.monotonic() < deadline:
            poll.poll(TICK * 1000)
            self._read_one(done)


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[int]:
    """A file in memory to be read from: no writer that could block, and nothing on a command line. Nothing is /dev/null."""
    fd = os.memfd_create("sisu-kodo", os.MFD_CLOEXEC) if content else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if content:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
