"""The boxes of one server: directories, cgroups and jails of controller/sbx, with E2B's ids, metadata and time limits on top.

A command is one jail, run and followed by a thread of its own; the event loop hears of it through a Process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controller.core.contract import Limits
from controller.core.model import Owner
from controller.sbx import jail
from controller.sbx.boxes import Boxes, NoFreeUid
from controller.sbx.limits import CgroupTree, rlimits
from controller.sbx.local import UIDS
from controller.sbx.run import Cell, Result, Sink, Stop
from controller.sbx.spawn import Launcher
from controller.sbx.templates import Template

BACKLOG = 1 << 20  # bytes of output that wait for a reader
FILE_SECONDS = 60.0
SIZE = Limits(cpu_millis=2000, memory_mb=512, pids=1024, disk_mb=10_240)  # of every box


class Full(Exception):
    """As many boxes run as this host takes."""


class Process:
    """One command. `events` are (`stdout` | `stderr`, bytes) and at last (`end`, Result)."""

    def __init__(self, sandbox: Sandbox, pid: int, argv: Sequence[str], *, deadline: float) -> None:
        self.sandbox, self.pid, self.argv = sandbox, pid, list(argv)
        self.events: asyncio.Queue[tuple[str, bytes | Result]] = asyncio.Queue()
        self.detached = self.killed = False
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._waiting = 0
        self._room = threading.Condition()

    def feed(self, kind: str, data: bytes) -> None:
        """Called in the command's thread. Blocks while too much waits for a reader."""
        with self._room:
            while self._waiting > BACKLOG and self.stop() is None and not self.detached:
                self._room.wait(0.1)
            self._waiting += len(data)
        if not self.detached:
            self._tell(kind, data)

    def end(self, ended: Result) -> None:
        """Called in the command's thread."""
        self._tell("end", ended)

    def taken(self, count: int) -> None:
        """The reader has written so many bytes."""
        with self._room:
            self._waiting -= count
            self._room.notify()

    def stop(self) -> Stop | None:
        """Why the command must end now."""
        if self.killed or self.sandbox.dead:
            return Stop.KILLED
        return Stop.TIMEOUT if time.monotonic() >= self._deadline else None

    def _tell(self, kind: str, what: bytes | Result) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended before the command
            self._loop.call_soon_threadsafe(self.events.put_nowait, (kind, what))


@dataclass(kw_only=True)
class Sandbox:
    """One box."""

    id: str
    template: str
    metadata: Mapping[str, str]
    envs: Mapping[str, str]
    started: float
    end_at: float
    cell: Cell
    accounts: Path
    made_from: Template
    stack: contextlib.ExitStack
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    dead: bool = False
    processes: dict[int, Process] = field(default_factory=dict)
    _pids: itertools.count[int] = field(default_factory=lambda: itertools.count(2))
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, argv: Sequence[str], *, envs: Mapping[str, str], cwd: str, seconds: float) -> Process:
        """Begins a command."""
        process = Process(self, next(self._pids), argv, deadline=time.monotonic() + seconds)
        self.processes[process.pid] = process
        view = self._view({**self.envs, **envs}, cwd)

        def follow() -> None:
            try:
                self.follow(process, view=view)
            finally:
                self.processes.pop(process.pid, None)

        thread = threading.Thread(target=follow, name=f"{self.id}-{process.pid}", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()
        return process

    def follow(self, process: Process, *, view: bytes | None = None, stdin: bytes = b"") -> None:
        """Runs it to its end, which is told as its last event; blocks."""
        try:
            sink = Sink(feed=process.feed, full=lambda _: process.detached)
            view = self._view(self.envs, "/") if view is None else view
            process.end(self.cell.run(process.argv, view=view, sink=sink, watch=process.stop, stdin=stdin))
        except Exception as e:  # noqa: BLE001 - told to whoever reads the stream
            process.end(Result(failure=str(e)))

    def tool(self, argv: Sequence[str], *, stdin: bytes = b"") -> tuple[Result, bytes]:
        """A short command of ours to its end; blocks. Inside the jail, so that no planted link leads out."""
        out = bytearray()
        deadline = time.monotonic() + FILE_SECONDS

        def watch() -> Stop | None:
            return Stop.KILLED if self.dead or time.monotonic() > deadline else None

        sink = Sink(feed=lambda kind, data: out.extend(data) if kind == "stdout" else None)
        ended = self.cell.run(argv, view=self._view({}, "/"), sink=sink, watch=watch, stdin=stdin)
        return ended, bytes(out)

    def kill(self) -> None:
        """What runs in it is dead on return, and its directory gone; blocks."""
        self.dead = True
        with contextlib.suppress(FileNotFoundError):
            self.cell.box.kill()
        for thread in self._threads:
            thread.join(timeout=10)
        self.stack.close()

    def _view(self, envs: Mapping[str, str], cwd: str) -> bytes:
        tree = self.cell.box.tree
        return jail.arguments(
            jail.View(
                accounts=self.accounts,
                workspace=tree / "workspace",
                output=tree / "output",
                tmp=tree / "tmp",
                binds=self.made_from.binds,
                env={
                    **jail.environment(self.made_from.env, self.made_from.path, {}),
                    "E2B_SANDBOX_ID": self.id,
                    **envs,
                },
                workdir=cwd,
            )
        )


class Host:
    """All boxes. `templates` are by template id. Thread-safe."""

    def __init__(
        self, root: Path, *, templates: Mapping[str, Template], limit: int = 20, cgroups: str = "sisu-kodo-e2b"
    ):
        self.templates = dict(templates)
        self.sandboxes: dict[str, Sandbox] = {}
        self._limit = limit
        self._launcher = Launcher()
        self._cgroups = CgroupTree.find(parent=cgroups)
        self._boxes = Boxes(root, uids=UIDS if self._cgroups.roots else ())
        self._boxes.sweep(lambda name: self._cgroups.named(name).remove())
        self._lock = threading.Lock()
        self._taken = 0
        self._closed = False

    def build(self, template: str) -> str:
        """The id of a template's build."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, self.templates[template].ref))

    def create(self, template: str, *, metadata: Mapping[str, str], envs: Mapping[str, str], seconds: float) -> Sandbox:
        """A new box; blocks. Raises Full, and KeyError for an unknown template."""
        with self._lock:
            if self._taken >= self._limit:
                raise Full(f"you have reached the maximum number of concurrent E2B sandboxes ({self._limit})")
            self._taken += 1
        name = f"i{secrets.token_hex(10)}"
        stack = contextlib.ExitStack()
        stack.callback(self._give_back)
        try:
            uid = stack.enter_context(self._boxes.uid())
            owner = Owner(store_id="e2b-server", run_id=name, task_key="", attempt=1, fence=0)
            box = stack.enter_context(self._boxes.create(owner, uid=uid))
            group = self._cgroups.create(box.name, SIZE)
            stack.callback(group.remove)
        except BaseException as e:
            stack.close()
            if isinstance(e, NoFreeUid):
                raise Full(str(e)) from e
            raise
        prefix = rlimits(SIZE, memory=not group.directories)
        cell = Cell(
            launcher=self._launcher,
            bwrap=Path("/usr/bin/bwrap"),
            box=box,
            cgroup=group,
            uid=uid,
            prefix=prefix,
            grace=0.0,
        )
        now = time.time()
        made = Sandbox(
            id=name,
            template=template,
            metadata=metadata,
            envs=envs,
            started=now,
            end_at=now + seconds,
            cell=cell,
            accounts=self._boxes.accounts,
            made_from=self.templates[template],
            stack=stack,
        )
        self.sandboxes[name] = made
        if self._closed:  # meanwhile, and whoever asked for it has gone
            self.sandboxes.pop(name, None)
            made.kill()
        return made

    def close(self) -> None:
        """Kills every box, also those that are being made; blocks."""
        self._closed = True
        for sandbox in list(self.sandboxes.values()):
            sandbox.kill()
        self.sandboxes.clear()
        self._launcher.close()

    def _give_back(self) -> None:
        with self._lock:
            self._taken -= 1
