"""Starts jails on behalf of the controller: a small single-threaded child process, run by path with `python -I -S`.

Never imported. It exists because (1) bubblewrap's --die-with-parent follows the *thread* that spawned it, so the parent
must be a process whose main thread lives as long as the controller; (2) joining a cgroup and dropping root must happen
between fork and exec, which is not safe in a threaded process; (3) it sees the controller's death as end of file on
its socket, however the controller died, and then kills every jail. Standard library only: it starts in 15 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
from typing import Any

MAX_MESSAGE = 1 << 17
FDS = (
    "stdin",
    "stdout",
    "stderr",
    "args",
    "status",
    "done",
)  # as the controller sends them; all but `done` become 0..4


def enter(order: dict[str, Any]) -> None:
    """In the child: cgroups first (root only), then the unprivileged uid, then nothing of ours remains."""
    for procs in order["cgroups"]:
        with open(procs, "w") as file:
            file.write("0")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # under memory pressure of the host, jails go before the controller and its database
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)


def child(order: dict[str, Any], fds: list[int]) -> None:
    """Becomes bubblewrap, or says why not on the `done` pipe. Never returns."""
    done = fds[-1]
    try:
        enter(order)
        high = [os.dup2(fd, 100 + i, inheritable=False) for i, fd in enumerate(fds)]
        for target, fd in enumerate(high[:-1]):
            os.dup2(fd, target)
        done = high[-1]
        os.closerange(len(FDS) - 1, 100)
        os.execve(order["argv"][0], order["argv"], {})
    except OSError as error:
        os.write(done, json.dumps({"error": f"{error.strerror}: {error.filename}"}).encode() + b"\n")
    finally:
        os._exit(127)


def start(link: socket.socket, running: dict[int, int]) -> bool:
    """Serves one order. False when the controller is gone."""
    message, fds, _, _ = socket.recv_fds(link, MAX_MESSAGE, len(FDS))
    if not message:
        return False
    pid = os.fork()
    if pid == 0:
        child(json.loads(message), fds)
    for fd in fds[:-1]:
        os.close(fd)
    running[pid] = fds[-1]
    with contextlib.suppress(OSError):
        os.write(fds[-1], json.dumps({"pid": pid}).encode() + b"\n")
    return True


def reap(running: dict[int, int]) -> None:
    """Tells the controller how each ended jail ended; end of file on `done` without it means that we died."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        done = running.pop(pid)
        with contextlib.suppress(OSError):
            os.write(done, json.dumps({"status": status}).encode() + b"\n")
        os.close(done)


def kill_all(running: dict[int, int]) -> None:
    """The first child of a bubblewrap is its namespace's init; with it dies everything in the jail."""
    for pid in running:
        inits: list[str] = []
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
            inits = file.read().split()
        for victim in (*map(int, inits), pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)


def main() -> None:
    link = socket.socket(fileno=0)
    link.set_inheritable(False)
    control = link.fileno()
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    os.set_blocking(wake_r, False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the controller decides when tasks end, also after a Ctrl-C
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control, wake_r], [], [])
        if wake_r in ready:
            os.read(wake_r, 4096)
        reap(running)
        if control in ready and not start(link, running):
            break
    kill_all(running)


if __name__ == "__main__":
    main()
