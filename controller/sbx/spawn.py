"""The controller's end of `launcher.py`: hands it argv, cgroups, uid and descriptors, and gets a `done` pipe back.

The launcher is started with the first jail and again should it have died; it ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controller.core.errors import Unavailable

SCRIPT = Path(__file__).with_name("launcher.py")
MAX_ORDER = 100_000  # bytes; one SEQPACKET message must fit the socket's buffer


class Launcher:
    """Thread-safe. `spawn` costs one message and one fork of a 10 MB process."""

    def __init__(self, *, python: str = sys.executable) -> None:
        self._python = python
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, argv: Sequence[str], *, fds: Sequence[int], cgroups: Sequence[Path], uid: int | None) -> int:
        """Starts argv with fds = stdin, stdout, stderr, args, status as 0..4. Returns the read end of its `done` pipe.

        The caller keeps and closes its own fds. Raises Unavailable when the launcher cannot be reached.
        """
        order = {"argv": list(argv), "cgroups": [str(path) for path in cgroups], "uid": uid}
        message = json.dumps(order, ensure_ascii=False).encode()
        if len(message) > MAX_ORDER:
            raise Unavailable(
                f"the command line of the jail has {len(message)} bytes; at most {MAX_ORDER} can be passed"
            )
        done_r, done_w = os.pipe()
        try:
            self._send(message, [*fds, done_w])
        except OSError as e:
            os.close(done_r)
            raise Unavailable(f"the sandbox launcher does not answer: {e}") from e
        finally:
            os.close(done_w)
        return done_r

    def close(self) -> None:
        """Ends the launcher, and with it every jail that still runs."""
        with self._lock:
            self._stop()

    def _send(self, message: bytes, fds: list[int]) -> None:
        with self._lock:
            if self._link is None:
                self._link = self._start()
            try:
                socket.send_fds(self._link, [message], fds)
            except (BrokenPipeError, ConnectionResetError):
                self._stop()  # it was killed; its jails died with it and their callers see LOST
                self._link = self._start()
                socket.send_fds(self._link, [message], fds)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # A session of its own: a signal to the controller's process group must not reach it before the controller.
            self._process = subprocess.Popen(
                [self._python, "-I", "-S", str(SCRIPT)], stdin=theirs.fileno(), env={}, cwd="/", start_new_session=True
            )
        return ours

    def _stop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            self._process = None


def read_end(done: bytes) -> int | str | None:
    """What the `done` pipe said: a wait status, why bubblewrap could not be started, or None (the launcher died)."""
    ended: int | None = None
    for line in done.splitlines():
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            return str(answer["error"])
        if "status" in answer:
            ended = int(answer["status"])
    return ended


def read_pid(done: bytes) -> int | None:
    """The pid of bubblewrap's outer process, which is the first thing that the `done` pipe says."""
    line, newline, _ = done.partition(b"\n")
    return json.loads(line).get("pid") if newline else None
